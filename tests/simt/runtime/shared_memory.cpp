#include "shared_memory.h"

#include <sys/mman.h>

#include <map>
#include <new>

#include "sanitizers.h"
#include "scheduler.h"

namespace simt {
namespace {

constexpr size_t kArenaBytes = 512 << 10;  // twice what a block may use, for the gaps between slots
constexpr size_t kGap = 64;

struct Layout {
  std::vector<SharedSlot> slots;
  size_t end = 0;           // offset behind the last slot
  size_t static_bytes = 0;  // without gaps
};
std::map<const Launch*, Layout> layouts;

char* arenas() {
  static char* const memory = [] {
    void* p = mmap(nullptr, shared_arenas_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(p);
  }();
  return memory;
}

// Of each arena: how much of it was in use, and is poisoned again when the next block begins there.
std::array<size_t, kMaxResidentBlocks> used = {};

size_t& used_by(const Block& block) { return used[size_t(block.shared - arenas()) / kArenaBytes]; }

void open_slot(Block& block, const SharedSlot& slot) {
  const Unseen unseen;
  char* begin = block.shared + slot.offset;
  poison(begin - kGap, kGap + slot.bytes + kGap);
  unpoison(begin, slot.bytes);
  std::memset(begin, 0xff, slot.bytes);
  used_by(block) = slot.offset + slot.bytes + kGap;
}

// Adds a slot, in every block that is resident. Its address is a multiple of `alignment`, but not of twice that: what
// relies on more than was declared shows.
void* add_slot(const void* key, const char* name, size_t bytes, size_t alignment) {
  Layout& layout = layouts[launch];
  const size_t offset = (layout.end + kGap + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
  if (offset + bytes + kGap > kArenaBytes) fail("%s: %zu bytes of shared memory", name, bytes);
  layout.slots.push_back({key, name, offset, bytes});
  layout.end = offset + bytes;
  for_resident_blocks([&](Block& block) { open_slot(block, layout.slots.back()); });
  return current->block->shared + offset;
}

const SharedSlot* find_slot(const void* key) {
  for (const SharedSlot& slot : layouts[launch].slots)
    if (slot.key == key) return &slot;
  return nullptr;
}

}  // namespace

void* shared_array(const void* key, const char* name, size_t bytes, size_t alignment) {
  const Unseen unseen;
  if (const SharedSlot* slot = find_slot(key)) return current->block->shared + slot->offset;
  Layout& layout = layouts[launch];
  layout.static_bytes += bytes;
  if (layout.static_bytes > kStaticSharedBytes)
    fail("%s: %zu bytes of static shared memory; the device has %zu", name, layout.static_bytes, kStaticSharedBytes);
  if (layout.static_bytes + launch->dynamic_bytes > kSharedBytes)
    fail("%s: %zu bytes of shared memory; the device has %zu", name, layout.static_bytes + launch->dynamic_bytes,
         kSharedBytes);
  return add_slot(key, name, bytes, alignment);
}

void* dynamic_shared(const void* key, const char* name) {
  const Unseen unseen;
  constexpr size_t kAlignment = 128;
  if (const SharedSlot* slot = find_slot(key)) return current->block->shared + slot->offset;
  return add_slot(key, name, launch->dynamic_bytes, kAlignment);
}

void* map_shared_rank(void* p, unsigned rank) {
  Block& own = *current->block;
  Cluster& cluster = *own.cluster;
  if (rank >= cluster.blocks.size()) fail("block %u of a cluster of %zu", rank, cluster.blocks.size());
  Block& peer = *cluster.blocks[rank];
  if (peer.live == 0) fail("the shared memory of block %u of the cluster, which has exited", rank);
  if (&peer != &own) peer.mapped_in = cluster.epoch;
  return peer.shared + (static_cast<char*>(p) - own.shared);
}

bool is_shared(const void* p) { return size_t(static_cast<const char*>(p) - arenas()) < shared_arenas_bytes(); }

size_t offset_in_arena(const void* p) { return size_t(static_cast<const char*>(p) - arenas()) % kArenaBytes; }

const SharedSlot* find_shared_slot(const void* p) {
  const size_t offset = offset_in_arena(p);
  for (const SharedSlot& slot : layouts[launch].slots)
    if (offset - slot.offset < slot.bytes) return &slot;
  return nullptr;
}

void begin_shared_layouts() { layouts.clear(); }

char* shared_arena(unsigned index) { return arenas() + index * kArenaBytes; }
size_t shared_arenas_bytes() { return kMaxResidentBlocks * kArenaBytes; }

void reset_shared(Block& block) {
  poison(block.shared, used_by(block));
  for (const SharedSlot& slot : layouts[block.cluster->launch].slots) open_slot(block, slot);
}

}  // namespace simt
