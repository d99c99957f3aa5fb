// Runs cases of planted/*.cu: `runner CASE...`; without arguments it lists them. Every case runs under several
// schedules, whose results must be the same. Exit status 1 and the reason on standard output where one fails.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "planted/case.h"
#include "runtime/global_memory.h"
#include "runtime/launch.h"
#include "runtime/reuse.h"
#include "runtime/settings.h"

namespace planted {
namespace {

std::vector<std::pair<std::string, Run>>& registered() {
  static std::vector<std::pair<std::string, Run>> all;
  return all;
}

}  // namespace

Case::Case(const std::string& name, Run run) { registered().emplace_back(name, std::move(run)); }

const std::vector<std::pair<std::string, Run>>& cases() { return registered(); }

}  // namespace planted

namespace {

struct Schedule {
  simt::Order order;
  uint64_t seed;
  unsigned resident;
};
constexpr Schedule kSchedules[] = {
    {simt::Order::kAscending, 0, 1},  {simt::Order::kDescending, 0, 1}, {simt::Order::kAscending, 0, 0},
    {simt::Order::kDescending, 0, 0}, {simt::Order::kRandom, 1, 2},     {simt::Order::kRandom, 2, 3},
    {simt::Order::kRandom, 3, 7},     {simt::Order::kRandom, 4, 0},
};

void run(const planted::Run& body) {
  planted::Result first;
  for (const auto& [order, seed, resident] : kSchedules) {
    simt::settings = {order, seed, resident, true, false, 0xff, 1};
    simt::reset_traffic();
    simt::reset_launches();
    simt::reset_reuse();
    planted::Result result;
    try {
      result = body();
    } catch (...) {
      simt::forget_announced();
      throw;
    }
    simt::forget_announced();
    if (first.empty()) first = result;
    if (result.size() != first.size() || std::memcmp(result.data(), first.data(), result.size() * sizeof(float)))
      throw std::runtime_error("the result depends on the schedule");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const auto& cases = planted::cases();
  if (count == 1)
    for (const auto& [name, body] : cases) std::puts(name.c_str());
  for (int i = 1; i < count; ++i) {
    const auto found = std::find_if(cases.begin(), cases.end(), [&](const auto& c) { return c.first == arguments[i]; });
    if (found == cases.end()) {
      std::printf("%s: no such case\n", arguments[i]);
      return 2;
    }
    try {
      run(found->second);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", arguments[i], error.what());
      return 1;
    }
  }
  return 0;
}
