// What the operations would do: between `begin` and `end` those of the namespace CBAM_EXPLAIN_NAMESPACE, which take
// meta tensors, plan for a described device and write their launches down. cbam_fused/explanation.py defines their
// schemas.
#include "operation.h"

namespace cbam_fused {

void begin(int64_t capability, int64_t multiprocessors, int64_t l2_bytes, int64_t shared_bytes,
           int64_t block_shared_bytes) {
  static thread_local Recording own;
  own = {{capability, multiprocessors, l2_bytes, shared_bytes, block_shared_bytes}, {}, {}};
  recording = &own;
}

// A line `plan ROW GROUP_SAMPLES` where there was something to plan, and a line `launch NAME BLOCKS THREADS BYTES
// CLUSTER` for each launch: BYTES of dynamic shared memory, CLUSTER blocks in a cluster.
std::string end() {
  STD_TORCH_CHECK(recording, "cbam_fused: end without begin");
  std::string text;
  const Plan& plan = recording->plan;
  if (plan.row) text += std::string("plan ") + plan.row->name + " " + std::to_string(plan.group_samples) + "\n";
  for (const Recording::Launch& launch : recording->launches)
    text += std::string("launch ") + launch.name + " " + std::to_string(launch.grid.blocks) + " " +
            std::to_string(launch.grid.threads) + " " + std::to_string(launch.grid.dynamic_shared) + " " +
            std::to_string(launch.grid.cluster) + "\n";
  recording = nullptr;
  return text;
}

// The planner's table: lines `NAME STRATEGY PASSES REASON`, PASSES `once` where x is expected to be read from device
// memory once.
std::string rows() {
  const auto name_of = [](Strategy strategy) {
    return strategy == Strategy::kResident ? " resident" : strategy == Strategy::kSkewed ? " skewed" : " streaming";
  };
  std::string text;
  for (const PlanRow& row : kPlanRows)
    text +=
        std::string(row.name) + name_of(row.strategy) + (row.reads_x_once ? " once " : " each ") + row.reason + "\n";
  return text;
}

STABLE_TORCH_LIBRARY_IMPL(CBAM_EXPLAIN_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("begin", TORCH_BOX(&begin));
  m.impl("end", TORCH_BOX(&end));
  m.impl("rows", TORCH_BOX(&rows));
}

}  // namespace cbam_fused
