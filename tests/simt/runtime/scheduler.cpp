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

std::string error;  // of a kernel that runs

// Clusters, blocks and threads, with their stacks, serve one launch after another.
struct Slot {
  Cluster cluster;
  std::vector<std::unique_ptr<Block>> blocks;
};
std::vector<std::unique_ptr<Slot>> slots;

unsigned volume(dim3 d) { return d.x * d.y * d.z; }
unsigned clusters_of(const Launch& of) { return volume(of.grid) / volume(of.cluster); }
Index3 extent(dim3 d) { return {Index(d.x), Index(d.y), Index(d.z)}; }
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
  explicit Run(const std::vector<Launch>& launches) : launches_(launches), random_(settings.seed) {
    unsigned clusters = 0, threads = 1;  // of all launches; of the largest cluster
    for (const Launch& each : launches) {
      clusters += clusters_of(each);
      slot_blocks_ = std::max(slot_blocks_, volume(each.cluster));
      threads = std::max(threads, volume(each.cluster) * volume(each.block));
    }
    const unsigned fitting = std::min(kMaxResidentBlocks / slot_blocks_, kMaxFibers / threads);
    const unsigned resident = std::min({clusters, fitting, settings.resident ? settings.resident : clusters});
    while (slots.size() < resident) slots.push_back(std::make_unique<Slot>());
    free_.resize(resident);
    std::iota(free_.rbegin(), free_.rend(), 0u);
    for (unsigned i = 0; to_start_.size() < clusters; ++i)
      for (const Launch& each : launches)
        if (i < clusters_of(each)) to_start_.push_back({&each, i});
    std::reverse(to_start_.begin(), to_start_.end());  // taken from the end
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
      if (slots[slot]->cluster.launch == launch)
        for (Block* block : slots[slot]->cluster.blocks) visit(*block);
  }

 private:
  template <class T>
  void arrange(std::vector<T>& items) {
    if (settings.order == Order::kDescending) std::reverse(items.begin(), items.end());
    if (settings.order == Order::kRandom) std::shuffle(items.begin(), items.end(), random_);
  }

  void start_cluster() {
    const auto [what, index] = to_start_.back();
    const unsigned slot = free_.back();
    to_start_.pop_back();
    free_.pop_back();
    resident_.push_back(slot);
    const dim3 shape = what->cluster;
    const dim3 clusters(what->grid.x / shape.x, what->grid.y / shape.y, what->grid.z / shape.z);
    const Index3 first = position(index, clusters);
    Slot& owner = *slots[slot];
    Cluster& cluster = owner.cluster;
    cluster = {};
    cluster.launch = what;
    cluster.epoch = next_epoch();
    cluster.live = volume(shape) * volume(what->block);
    for (unsigned rank = 0; rank < volume(shape); ++rank) {
      if (rank >= owner.blocks.size()) owner.blocks.push_back(std::make_unique<Block>());
      Block& block = *owner.blocks[rank];
      const Index3 within = position(rank, shape);
      block.index = {Index(first.x * shape.x + within.x), Index(first.y * shape.y + within.y),
                     Index(first.z * shape.z + within.z)};
      block.rank = rank;
      block.cluster = &cluster;
      block.shared = shared_arena(slot * slot_blocks_ + rank);
      cluster.blocks.push_back(&block);
      start_threads(block, what->block);
      reset_shared(block);
    }
  }

  void start_threads(Block& block, dim3 shape) {
    block.size = block.live = volume(shape);
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
      thread.index = position(i, shape);
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
    launch = thread.block->cluster->launch;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    blockDim = extent(launch->block);
    gridDim = extent(launch->grid);
    thread.fiber.resume();
    current = nullptr;
    launch = nullptr;
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
    std::map<std::tuple<const Launch*, unsigned, State, std::string, int>, unsigned> groups;
    for (const Thread* thread : order_)
      if (thread->state != State::kDone)
        ++groups[{thread->block->cluster->launch, thread->block->index.x, thread->state, thread->place.name(),
                  thread->place.line}];
    std::string text = "deadlock:";
    size_t lines = 0;
    for (const auto& [where, count] : groups) {
      const auto& [of, block, state, file, line] = where;
      if (lines++ == kMostLines) return text + " and so on";
      text += (lines > 1 ? "; " : " ") + std::to_string(count) + " threads of block " + std::to_string(block) +
              number(*of) + " wait for " + kWhat.at(state) + " at " + file + ":" + std::to_string(line);
    }
    text += " [";
    for (const Launch& each : launches_) text += each.kernel + ", ";
    return text + std::to_string(to_start_.size()) + " clusters not started]";
  }

  // Which launch it is, where there are several.
  std::string number(const Launch& of) const {
    return launches_.size() == 1 ? "" : " of launch " + std::to_string(&of - launches_.data() + 1);
  }

  struct Start {
    const Launch* launch;
    unsigned cluster;
  };

  const std::vector<Launch>& launches_;
  std::mt19937_64 random_;
  unsigned slot_blocks_ = 1;               // of the largest cluster
  std::vector<Start> to_start_;            // clusters; the next is the last
  std::vector<unsigned> free_, resident_;  // slots
  std::vector<Thread*> order_;             // the threads of resident clusters
};

Run* running = nullptr;

// Says what runs, as long as it does.
struct Running {
  explicit Running(Run& all) { running = &all; }
  ~Running() { running = nullptr; }
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

void run(const std::vector<Launch>& launches) {
  if (running) throw std::runtime_error("a launch within a launch");
  error.clear();
  begin_shared_layouts();
  reset_requests();
  {
    Run all(launches);
    const Running guard(all);
    all();
  }
  if (error.empty()) return;
  slots.clear();  // stacks that were left in the middle of something
  throw std::runtime_error(error);
}

void for_resident_blocks(const std::function<void(Block&)>& visit) { running->for_blocks(visit); }

}  // namespace simt
