#include "reuse.h"

#include <algorithm>
#include <set>
#include <unordered_map>
#include <vector>

#include "global_memory.h"
#include "grid.h"

namespace simt {
namespace {

struct Touch {
  uintptr_t sector;
  const std::string* tensor;  // of `tensors`: the range it was announced in is forgotten before the trace is read
};
std::vector<Touch> trace;
std::set<std::string> tensors;

// A Fenwick tree: numbers, 0 at first, of which one can be changed and the first so many added up in logarithmic time.
class Sums {
 public:
  explicit Sums(size_t count) : parts_(count + 1) {}

  void add(size_t at, int64_t value) {
    for (size_t i = at + 1; i < parts_.size(); i += i & -i) parts_[i] += value;
  }
  int64_t of_first(size_t count) const {
    int64_t sum = 0;
    for (size_t i = count; i > 0; i -= i & -i) sum += parts_[i];
    return sum;
  }

 private:
  std::vector<int64_t> parts_;  // the i-th is the sum of as many as i's lowest bit says, up to the i-th number
};

}  // namespace

void note_touch(uintptr_t sector, const std::string& tensor) {
  if (current->block->touched.insert(sector).second) trace.push_back({sector, &*tensors.insert(tensor).first});
}

std::map<std::string, uint64_t> reuse() {
  std::map<std::string, uint64_t> largest;
  std::unordered_map<uintptr_t, size_t> latest;  // touch of each sector, so far
  Sums is_latest(trace.size());                  // 1 for those touches
  for (size_t i = 0; i < trace.size(); ++i) {
    const auto& [sector, tensor] = trace[i];
    uint64_t& bytes = largest[*tensor];
    const auto [found, first] = latest.try_emplace(sector, i);
    if (!first) {
      const size_t before = found->second;
      const uint64_t between = is_latest.of_first(i) - is_latest.of_first(before + 1);
      if (trace[before].tensor == tensor) bytes = std::max(bytes, between * kSectorBytes);
      is_latest.add(before, -1);
      found->second = i;
    }
    is_latest.add(i, 1);
  }
  return largest;
}

void reset_reuse() {
  trace.clear();
  tensors.clear();
}

}  // namespace simt
