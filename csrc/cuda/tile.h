// Tiles of a sample, and how the threads of a block walk one.
//
// A sample is a matrix [rows, columns], columns contiguous. A block has one tile of it. `lanes` neighbouring threads
// share a row of the tile, and each of them has the same few elements of every row it comes to; the rows are dealt to
// the groups of lanes in turn. So a warp reads neighbouring memory, and a thread adds up columns in its registers.
//
// Where rows are multiples of 16 bytes the elements of a thread are one vector; else they are single elements, `lanes`
// apart, so that neighbouring threads still access neighbouring elements. All of this, and with it the order of every
// sum, follows from the shape of a sample and the type of its elements.
#pragma once

#include "launch.h"
#include "memory.h"
#include "reduce.h"

namespace cbam_fused {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;
// Blocks that a multiprocessor holds at least, for kernels which the compiler would otherwise give so few registers
// that some spill.
constexpr int kTileBlocks = 2;
constexpr int kMostTileRows = 512;
constexpr int kRowsPerThread = 16;

// Elements of a row that a thread has.
template <class T, bool kAligned>
constexpr int kElements = kAligned ? kVector<T> : 2;
// No tile has more columns.
template <class T>
constexpr int kMostTileColumns = kWarp * kVector<T>;

// Room in shared memory for something of each column of a tile.
template <class T>
constexpr int kColumnSlots = kMostTileColumns<T> + kWarp;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tiling {
  int64_t rows, columns;        // of a sample's matrix
  int lanes;                    // threads that share a row: a power of two, at most a warp
  int tile_rows, tile_columns;  // of a tile; the last ones may have less
  int row_tiles, column_tiles;  // of a sample
  bool aligned;                 // whether rows are whole vectors

  int64_t tiles() const { return int64_t(row_tiles) * column_tiles; }
};

// Rows a block goes through between two meetings of its threads.
__host__ __device__ inline int rows_per_step(int lanes) {
  const int rows = kTileThreads / lanes * kRowsPerThread;
  return rows < kMostTileRows ? rows : kMostTileRows;
}

// The tiling for x of `shape` in T: tiles as wide as a warp reads at once, of at most `steps` times rows_per_step rows
// (0: of any number), all of nearly the same size.
template <class T>
Tiling tiling(const Shape& shape, int64_t steps = 1) {
  Tiling t = {};
  t.rows = shape.rows();
  t.columns = shape.columns();
  t.aligned = t.columns % kVector<T> == 0;
  const int64_t unit = t.aligned ? kVector<T> : 1;
  const int64_t most_units = t.aligned ? kWarp : kWarp * kElements<T, false>;
  const int64_t units = t.columns / unit;
  // An even number of vectors: tiles begin at multiples of 32 bytes, the unit of the caches, where rows do.
  int64_t tile_units = ceil_div(units, ceil_div(units, most_units));
  if (tile_units < units) tile_units += tile_units % 2;
  t.tile_columns = int(tile_units * unit);
  t.column_tiles = int(ceil_div(t.columns, t.tile_columns));
  t.lanes = lanes_for(tile_units);
  const int64_t step = rows_per_step(t.lanes), lines = kTileThreads / t.lanes;
  const int64_t row_tiles = steps == 0 ? 1 : ceil_div(t.rows, steps * step);
  const int64_t tile_rows = ceil_div(ceil_div(t.rows, row_tiles), lines) * lines;
  t.tile_rows = int(tile_rows);
  t.row_tiles = int(ceil_div(t.rows, tile_rows));
  return t;
}

// A thread's elements of a row.
template <class T, bool kAligned>
struct alignas(kAligned ? 16 : alignof(T)) Elements {
  T values[kElements<T, kAligned>];
};

// The samples that a grid serves, and their order.
struct Samples {
  int64_t first, count;
  bool descending;  // from the last to the first

  __host__ __device__ int64_t operator[](int64_t i) const { return first + (descending ? count - 1 - i : i); }
};

// The tile of a block, and the thread's place in it.
template <class T, bool kAligned>
struct Tile {
  int64_t sample;                   // which of the N
  int row_tile, column_tile;        // which of the sample's
  int64_t first_row, first_column;  // in the sample
  int rows, columns;                // of this tile
  int lanes, lines;                 // threads of a row, and rows at a time
  int lane, line;                   // of this thread: it has rows line, line + lines, ...
  int64_t pitch;                    // from a row to the next
  int64_t start;                    // of the tile, in the tensor

  // Blocks are the tiles of the first sample, row by row, then those of the second, ...
  __device__ Tile(const Tiling& t, const Samples& samples, unsigned block)
      : lanes(t.lanes), lines(kTileThreads / t.lanes), pitch(t.columns) {
    const unsigned thread = threadIdx.x;
    const unsigned tiles = unsigned(t.row_tiles) * unsigned(t.column_tiles);  // no more than blocks
    const unsigned within = block % tiles;
    sample = samples[block / tiles];
    row_tile = int(within / unsigned(t.column_tiles));
    column_tile = int(within % unsigned(t.column_tiles));
    first_row = int64_t(row_tile) * t.tile_rows;
    first_column = int64_t(column_tile) * t.tile_columns;
    rows = int(t.rows - first_row < t.tile_rows ? t.rows - first_row : t.tile_rows);
    columns = int(t.columns - first_column < t.tile_columns ? t.columns - first_column : t.tile_columns);
    lane = int(thread % unsigned(t.lanes));
    line = int(thread / unsigned(t.lanes));
    start = (sample * t.rows + first_row) * pitch + first_column;
  }

  // Element i of the thread: its column of the tile, which may lie behind the last.
  __device__ int column(int i) const { return kAligned ? lane * kVector<T> + i : i * lanes + lane; }

  // Where a tile's columns are in an array of kColumnSlots: with a gap behind those of each thread, which keeps the
  // threads of a warp out of each other's banks.
  __device__ static int slot(int column) { return kAligned ? column + column / kVector<T> : column; }

  // The thread's elements of row `row` of the tile; 0 for those that do not exist.
  __device__ Elements<T, kAligned> load_row(const T* x, int row) const {
    Elements<T, kAligned> elements = {};
    if (row >= rows) return elements;
    const T* source = x + start + row * pitch;
    if constexpr (kAligned) {
      if (column(0) < columns) elements = load(reinterpret_cast<const Elements<T, kAligned>*>(source + column(0)));
    } else {
#pragma unroll
      for (int i = 0; i < kElements<T, kAligned>; ++i)
        if (column(i) < columns) elements.values[i] = load(source + column(i));
    }
    return elements;
  }
  __device__ void store_row(T* y, int row, const Elements<T, kAligned>& elements) const {
    if (row >= rows) return;
    T* target = y + start + row * pitch;
    if constexpr (kAligned) {
      if (column(0) < columns) store(reinterpret_cast<Elements<T, kAligned>*>(target + column(0)), elements);
    } else {
#pragma unroll
      for (int i = 0; i < kElements<T, kAligned>; ++i)
        if (column(i) < columns) store(target + column(i), elements.values[i]);
    }
  }
};

// ---- Sums over a tile -----------------------------------------------------------------------------------------------

// Room for a block's numbers of one step, one of each thread and row, in shared memory. A row is followed by a gap
// where that keeps threads that add up rows out of each other's banks.
constexpr int kRowEntries = kMostTileRows * 9;

__device__ inline int row_pitch(int lanes) { return lanes < 8 ? lanes : lanes + 1; }

// The sum of `count` numbers, `stride` apart, in four chains.
template <class A>
__device__ inline A sum_chains(const A* values, int count, int stride) {
  A chains[4] = {};
  int i = 0;
  for (; i + 4 <= count; i += 4)
#pragma unroll
    for (int k = 0; k < 4; ++k) chains[k] += values[(i + k) * stride];
  for (int k = 0; i + k < count; ++k) chains[0] += values[(i + k) * stride];
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// The sums over the rows of a tile, of which every thread has those of its own rows: calls f(column, sum) for each
// column of the tile. `room` is kMostTileColumns<T> * kTileWarps numbers. All threads of the block call.
template <class T, bool kAligned, class F>
__device__ inline void for_column_sums(const Tile<T, kAligned>& tile, Compute<T> (&sums)[kElements<T, kAligned>],
                                       Compute<T>* room, F f) {
  constexpr int kWidth = kMostTileColumns<T>;
  const int thread = int(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kElements<T, kAligned>; ++i) {
    for (int offset = tile.lanes; offset < kWarp; offset *= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], offset);
    if (thread % kWarp < tile.lanes) room[thread / kWarp * kWidth + tile.column(i)] = sums[i];
  }
  __syncthreads();
  for (int column = thread; column < tile.columns; column += kTileThreads)
    f(column, sum_chains(room + column, kTileWarps, kWidth));
}

// The sum over the threads of a block, in thread 0. `room` is kTileWarps numbers.
template <class A>
__device__ inline A block_sum(A value, A* room) {
  const int thread = int(threadIdx.x);
  value = group_sum(value, kWarp);
  if (thread % kWarp == 0) room[thread / kWarp] = value;
  __syncthreads();
  return thread == 0 ? sum_chains(room, kTileWarps, 1) : A(0);
}

// The sum of `count` partial sums, `stride` elements apart, in device memory: chains of 32, and a chain of those.
template <class A>
__device__ inline A sum_partials(const A* first, int64_t count, int64_t stride) {
  A total = 0;
  for (int64_t begin = 0; begin < count; begin += 32) {
    const int end = int(count - begin < 32 ? count - begin : 32);
    A chain = 0;
#pragma unroll 8
    for (int i = 0; i < end; ++i) chain += load(first + (begin + i) * stride);
    total += chain;
  }
  return total;
}

}  // namespace cbam_fused
