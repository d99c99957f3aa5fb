#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <tuple>

#include "barriers.h"
#include "cuda_index.h"
#include "global_memory.h"
#include "sanitizers.h"
#include "settings.h"
#include "shared_memory.h"

namespace simt {
namespace {

std::string error;  // of the kernel that runs

// Clusters, blocks and threads, with their stacks, serve one launch after another.
struct Slot {
  Cluster cluster;
  std::vector<std::unique_ptr<Block>> blocks;
};
std::vector<std::unique_ptr<Slot>> slots;

unsigned volume(dim3 d) { return d.x * d.y * d.z; }
Index3 position(unsigned flat, dim3 d) { return {Index(flat % d.x), Index(flat / d.x % d.y), Index(flat / d.x / d.y)}; }

char launch_token, end_token;

void thread_main() {
  acquire(&launch_token);
  acquire(&current->block->reuse);
  launch->body();
  exit_thread();
  release(&current->block->reuse);
  release(&end_token);
}

class Run {
 public:
  explicit Run(const Launch& what) : random_(settings.seed) {
    const unsigned blocks = volume(what.cluster);
    const unsigned clusters = volume(what.grid) / blocks;
    const unsigned fitting = std::min(kMaxResidentBlocks / blocks, kMaxFibers / (blocks * volume(what.block)));
    const unsigned resident = std::min({clusters, fitting, settings.resident ? settings.resident : clusters});
    while (slots.size() < resident) slots.push_back(std::make_unique<Slot>());
    free_.resize(resident);
    std::iota(free_.rbegin(), free_.rend(), 0u);
    to_start_.resize(clusters);
    std::iota(to_start_.rbegin(), to_start_.rend(), 0u);  // taken from the end
    arrange(to_start_);
    release(&launch_token);
  }

  void operator()() {
    while (error.empty()) {
      while (!free_.empty() && !to_start_.empty()) start_cluster();
      if (order_.empty()) break;
      if (!pass()) error = deadlock();
      if (error.empty()) retire();
    }
    for (Thread* thread : order_)  // none, unless there was an error
      thread->fiber.abandon(&end_token);
    acquire(&end_token);
  }

  void for_blocks(const std::function<void(Block&)>& visit) {
    for (const unsigned slot : resident_)
      for (Block* block : slots[slot]->cluster.blocks) visit(*block);
  }

 private:
  template <class T>
  void arrange(std::vector<T>& items) {
    if (settings.order == Order::kDescending) std::reverse(items.begin(), items.end());
    if (settings.order == Order::kRandom) std::shuffle(items.begin(), items.end(), random_);
  }

  void start_cluster() {
    const unsigned index = to_start_.back(), slot = free_.back();
    to_start_.pop_back();
    free_.pop_back();
    resident_.push_back(slot);
    const dim3 shape = launch->cluster;
    const dim3 clusters(launch->grid.x / shape.x, launch->grid.y / shape.y, launch->grid.z / shape.z);
    const Index3 first = position(index, clusters);
    Slot& owner = *slots[slot];
    Cluster& cluster = owner.cluster;
    cluster = {};
    cluster.epoch = next_epoch();
    cluster.live = volume(shape) * volume(launch->block);
    for (unsigned rank = 0; rank < volume(shape); ++rank) {
      if (rank >= owner.blocks.size()) owner.blocks.push_back(std::make_unique<Block>());
      Block& block = *owner.blocks[rank];
      const Index3 within = position(rank, shape);
      block.index = {Index(first.x * shape.x + within.x), Index(first.y * shape.y + within.y),
                     Index(first.z * shape.z + within.z)};
      block.rank = rank;
      block.cluster = &cluster;
      block.shared = shared_arena(slot * volume(shape) + rank);
      cluster.blocks.push_back(&block);
      start_threads(block);
      reset_shared(block);
    }
  }

  void start_threads(Block& block) {
    block.size = block.live = volume(launch->block);
    block.arrived = block.votes = block.syncs = 0;
    block.mapped_in = 0;
    block.touched.clear();
    block.epoch = next_epoch();
    block.warps.assign((block.size + kWarpSize - 1) / kWarpSize, Warp{});
    for (unsigned i = 0; i < block.size; ++i) {
      if (i >= block.threads.size()) block.threads.push_back(std::make_unique<Thread>());
      Thread& thread = *block.threads[i];
      Warp& warp = block.warps[i / kWarpSize];
      if (warp.count == 0) warp.epoch = next_epoch();
      thread.index = position(i, launch->block);
      thread.lane = warp.count++;
      thread.warp = &warp;
      thread.block = &block;
      thread.state = State::kReady;
      thread.copies.clear();
      thread.sites.clear();
      thread.noted_begin = thread.noted_end = 0;
      warp.lanes[thread.lane] = &thread;
      warp.live |= 1u << thread.lane;
      thread.fiber.prepare(&thread_main);
      order_.push_back(&thread);
    }
  }

  // Lets every thread that can go on do so once; of a random schedule about half of them. False: none can.
  bool pass() {
    std::vector<Thread*> turn = order_;
    arrange(turn);
    bool any = false;
    for (Thread* thread : turn) {
      if (!can_go_on(*thread)) continue;
      any = true;
      if (settings.order == Order::kRandom && random_() & 1) continue;
      resume(*thread);
      if (!error.empty()) return true;
    }
    return any;
  }

  static bool can_go_on(Thread& thread) {
    if (thread.state == State::kAtFlag && __atomic_load_n(thread.flag, __ATOMIC_RELAXED) >= thread.awaited)
      thread.state = State::kReady;
    return thread.state == State::kReady;
  }

  static void resume(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    thread.fiber.resume();
    current = nullptr;
  }

  // Clusters that are done make room for others.
  void retire() {
    const auto is_done = [](unsigned slot) { return slots[slot]->cluster.live == 0; };
    if (std::none_of(resident_.begin(), resident_.end(), is_done)) return;
    order_.erase(std::remove_if(order_.begin(), order_.end(),
                                [](const Thread* thread) { return thread->block->cluster->live == 0; }),
                 order_.end());
    for (const unsigned slot : resident_)
      if (is_done(slot)) {
        free_.push_back(slot);
        for (const Block* block : slots[slot]->cluster.blocks) end_requests(*block);
      }
    resident_.erase(std::remove_if(resident_.begin(), resident_.end(), is_done), resident_.end());
  }

  // Who waits for what, where.
  std::string deadlock() const {
    static const std::map<State, const char*> kWhat = {{State::kAtBlockBarrier, "__syncthreads"},
                                                       {State::kAtClusterBarrier, "the barrier of the cluster"},
                                                       {State::kInWarp, "the other lanes of a mask"},
                                                       {State::kAtFlag, "a flag"}};
    constexpr size_t kMostLines = 8;
    std::map<std::tuple<unsigned, State, std::string, int>, unsigned> groups;
    for (const Thread* thread : order_)
      if (thread->state != State::kDone)
        ++groups[{thread->block->index.x, thread->state, thread->place.name(), thread->place.line}];
    std::string text = "deadlock:";
    size_t lines = 0;
    for (const auto& [where, count] : groups) {
      const auto& [block, state, file, line] = where;
      if (lines++ == kMostLines) return text + " and so on";
      text += (lines > 1 ? "; " : " ") + std::to_string(count) + " threads of block " + std::to_string(block) +
              " wait for " + kWhat.at(state) + " at " + file + ":" + std::to_string(line);
    }
    return text + " [" + launch->kernel + ", " + std::to_string(to_start_.size()) + " clusters not started]";
  }

  std::mt19937_64 random_;
  std::vector<unsigned> to_start_;         // clusters; the next is the last
  std::vector<unsigned> free_, resident_;  // slots
  std::vector<Thread*> order_;             // the threads of resident clusters
};

Run* running = nullptr;

// Says which launch runs, as long as it does.
struct Running {
  Running(const Launch& what, Run& all) {
    launch = &what;
    running = &all;
  }
  ~Running() {
    launch = nullptr;
    running = nullptr;
  }
};

}  // namespace

void fail(const char* format, ...) {
  const Unseen unseen;
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!current) throw std::runtime_error(text);
  error = std::string(text) + " [" + launch->kernel + ", block " + std::to_string(blockIdx.x) + ", thread " +
          std::to_string(threadIdx.x) + "]";
  Unseen::end_all();
  current->fiber.finish();
}

void run(const Launch& what) {
  if (launch) throw std::runtime_error("a launch within a launch");
  error.clear();
  blockDim = {Index(what.block.x), Index(what.block.y), Index(what.block.z)};
  gridDim = {Index(what.grid.x), Index(what.grid.y), Index(what.grid.z)};
  begin_shared_layout();
  reset_requests();
  {
    Run all(what);
    const Running guard(what, all);
    all();
  }
  if (error.empty()) return;
  slots.clear();  // stacks that were left in the middle of something
  throw std::runtime_error(error);
}

void for_resident_blocks(const std::function<void(Block&)>& visit) { running->for_blocks(visit); }

}  // namespace simt
