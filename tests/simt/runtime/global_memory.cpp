#include "global_memory.h"

#include <algorithm>
#include <cinttypes>
#include <tuple>
#include <utility>
#include <vector>

#include "grid.h"
#include "reuse.h"
#include "sanitizers.h"
#include "settings.h"

namespace simt {
namespace {

constexpr size_t kWidestAccess = 16;

struct Range {
  uintptr_t begin, end;
  std::string name;
  Traffic* traffic;
  std::shared_ptr<const void> owner;
};

std::vector<Range> ranges;
std::map<std::string, Traffic> traffic_by_name;

const Range* find(uintptr_t address) {
  static size_t latest = 0;
  const auto holds = [&](const Range& range) { return address >= range.begin && address < range.end; };
  if (latest < ranges.size() && holds(ranges[latest])) return &ranges[latest];
  for (latest = 0; latest < ranges.size(); ++latest)
    if (holds(ranges[latest])) return &ranges[latest];
  return nullptr;
}

uintptr_t distance(const Range& range, uintptr_t address) {
  return address < range.begin ? range.begin - address : address - range.end;
}

[[noreturn]] void fail_unknown(const char* access, size_t bytes, uintptr_t address) {
  const auto nearest = std::min_element(ranges.begin(), ranges.end(), [&](const Range& a, const Range& b) {
    return distance(a, address) < distance(b, address);
  });
  if (nearest == ranges.end()) fail("%s of %zu bytes: no memory was announced", access, bytes);
  fail("%s of %zu bytes out of bounds: %" PRIuPTR " bytes %s %s", access, bytes, distance(*nearest, address),
       address < nearest->begin ? "before" : "behind", nearest->name.c_str());
}

// A request: the accesses of a warp's lanes by one instruction, the same time they each come there.
using Request = std::tuple<const Warp*, void*, unsigned>;
std::map<Request, std::vector<uintptr_t>> requests;  // the sectors each has touched

unsigned times_at(Thread& thread, void* site) {
  for (auto& [seen, times] : thread.sites)
    if (seen == site) return ++times;
  thread.sites.emplace_back(site, 0);
  return 0;
}

uint64_t new_sectors(uintptr_t address, size_t bytes, void* site) {
  std::vector<uintptr_t>& sectors = requests[{current->warp, site, times_at(*current, site)}];
  const size_t before = sectors.size();
  for (uintptr_t sector = address / kSectorBytes; sector <= (address + bytes - 1) / kSectorBytes; ++sector)
    if (std::find(sectors.rbegin(), sectors.rend(), sector) == sectors.rend()) sectors.push_back(sector);
  return sectors.size() - before;
}

}  // namespace

void announce(const void* p, size_t bytes, const char* name, bool fresh, std::shared_ptr<const void> owner) {
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  ranges.push_back({begin, begin + bytes, name, &traffic_by_name[name], std::move(owner)});
  if (fresh) std::memset(const_cast<void*>(p), settings.fill, bytes);
}

void forget_announced() { ranges.clear(); }

void note_access(const void* p, size_t bytes, bool store) {
  const Unseen unseen;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const char* access = store ? "store" : "load";
  if (!current) fail("%s of global memory in host code", access);
  if (bytes == 0 || bytes > kWidestAccess || (bytes & (bytes - 1))) fail("%s of %zu bytes at once", access, bytes);
  const Range* range = find(address);
  if (!range) fail_unknown(access, bytes, address);
  const auto offset = size_t(address - range->begin);
  if (address + bytes > range->end)
    fail("%s of %zu bytes out of bounds: at byte %zu of %zu of %s", access, bytes, offset,
         size_t(range->end - range->begin), range->name.c_str());
  if (address % bytes)
    fail("%s of %zu bytes at a misaligned address: byte %zu of %s", access, bytes, offset, range->name.c_str());
  (store ? range->traffic->stored : range->traffic->loaded) += bytes;
  if (settings.count_sectors)
    (store ? range->traffic->stored_sectors : range->traffic->loaded_sectors) +=
        new_sectors(address, bytes, __builtin_return_address(0));
  // No access leaves its sector: it is aligned, and not wider.
  if (settings.count_reuse) note_touch(address / kSectorBytes, range->name);
  current->noted_begin = address;
  current->noted_end = address + bytes;
  current->noted_left = bytes;
}

bool is_announced(const void* p) { return find(reinterpret_cast<uintptr_t>(p)) != nullptr; }

const std::map<std::string, Traffic>& traffic() { return traffic_by_name; }

void reset_traffic() {
  for (auto& [name, counts] : traffic_by_name) counts = {};
}

void end_requests(const Block& block) {
  if (requests.empty()) return;
  const auto first = requests.lower_bound({block.warps.data(), nullptr, 0});
  const auto last = requests.lower_bound({block.warps.data() + block.warps.size(), nullptr, 0});
  requests.erase(first, last);
}

void reset_requests() { requests.clear(); }

}  // namespace simt
