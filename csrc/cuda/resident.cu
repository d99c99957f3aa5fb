// The kernel of the cluster-resident form (see resident.cuh).
#include <cuda_pipeline.h>

#include <map>
#include <tuple>

#include "cluster.h"
#include "resident.cuh"

namespace cbam_fused {

#ifdef CBAM_HAS_CLUSTERS

// One block's share of a sample's inference.
template <class T, bool kAligned, bool kChannelsLast>
struct ResidentBlock {
  using A = Compute<T>;

  const Resident<T>& p;
  const int rank, thread;
  const int64_t sample;
  const int64_t first_row, rows;  // of this block
  const int64_t channels, pixels;
  T* x;  // [rows, columns]
  A *inputs, *branch_hidden, *hidden, *gate, *leaf_sums, *leaf_maxima, *maps, *spatial_gate, *sums;
  const int input_pitch, hidden_pitch;

  __device__ ResidentBlock(const Resident<T>& p, unsigned char* room)
      : p(p),
        rank(cluster_rank()),
        thread(int(threadIdx.x)),
        sample(blockIdx.x / unsigned(p.blocks)),
        first_row(int64_t(rank) * p.block_leaves * kLeafRows),
        rows(min(int64_t(p.block_leaves) * kLeafRows, p.rows - first_row)),
        channels(p.descriptors.channels),
        pixels(kChannelsLast ? p.rows : p.columns),
        x(reinterpret_cast<T*>(room)),
        input_pitch(GateRoom::rounded_up(channels)),
        hidden_pitch(GateRoom::rounded_up(p.mlp.reduced)) {
    const ResidentRoom sizes(p, kChannelsLast);
    inputs = reinterpret_cast<A*>(x + sizes.x);
    branch_hidden = inputs + sizes.inputs;
    hidden = branch_hidden + sizes.branch_hidden;
    gate = hidden + sizes.hidden;
    leaf_sums = gate + sizes.gate;
    leaf_maxima = leaf_sums + sizes.leaves;
    maps = leaf_maxima + sizes.leaves;
    spatial_gate = maps + sizes.maps;
    sums = spatial_gate + sizes.spatial_gate;
  }

  __device__ void run() {
    load_x();
    pool_pixels();
    p.mlp.visit([&](const auto& mlp) { gate_channels(mlp); });
    pool_channels();
    gate_pixels();
    apply();
  }

 private:
  // What the blocks divide among them: so many of each.
  __device__ int64_t share(int64_t count) const { return ceil_div(count, p.blocks); }
  __device__ int64_t share_begin(int64_t count) const { return min(rank * share(count), count); }
  __device__ int64_t share_end(int64_t count) const { return min((rank + 1) * share(count), count); }
  __device__ int64_t block_rows() const { return int64_t(p.block_leaves) * kLeafRows; }

  // Completes `values`, of which each block has `share` in turn.
  __device__ void gather(A* values, int64_t count, int64_t share) const {
    for (int64_t i = thread; i < count; i += kResidentThreads) {
      const int owner = int(i / share);
      if (owner != rank) values[i] = in_block(values, owner)[i];
    }
  }

  __device__ void load_x() const {
    const T* source = p.apply.x + (sample * p.rows + first_row) * p.columns;
    for (int64_t i = thread * kVector<T>; i < rows * p.columns; i += kResidentThreads * kVector<T>)
      __pipeline_memcpy_async(x + i, source + i, 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }

  // Calls use(row, pools) for each row of the block, by one thread for each.
  template <class Factors, class Use>
  __device__ void pool_rows(const Factors& factors, Use use) const {
    const int at_once = p.order.rows_at_once(), group = thread / p.order.lanes;
    const int step = kResidentThreads / p.order.lanes * at_once;
    for (int64_t first = 0; first < rows; first += step)
      reduce_row_part<kAligned, Ties::kNone, false, Space::kShared>(
          x, rows, p.columns, p.order, sample, factors, first + group * at_once, 0,
          [&](int64_t row, const Pools<A>& pools) {
            use(row, total_of_parts<Ties::kNone, false, A>(1, [&](int64_t) { return pools; }));
          });
  }

  // Pools the leaves of every column, for all blocks to see.
  template <class Factors>
  __device__ void pool_leaves(const Factors& factors) const {
    constexpr int kCount = kColumns<T, kAligned>;
    const int64_t strips = ceil_div(p.columns, kCount), leaves = ceil_div(rows, kLeafRows);
    for (int64_t i = thread; i < leaves * strips; i += kResidentThreads) {
      const int64_t leaf = i / strips, strip = i % strips;
      const unsigned column = unsigned(kAligned ? strip * kCount : strip), apart = unsigned(kAligned ? 1 : strips);
      Pools<A> pools[kCount];
      reduce_leaf<kAligned, Ties::kNone, false, Space::kShared>(x + leaf * kLeafRows * p.columns,
                                                                rows - leaf * kLeafRows, p.columns, column, apart,
                                                                sample, first_row + leaf * kLeafRows, factors, pools);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int64_t at = column + k * apart;
        if (at >= p.columns) break;
        leaf_sums[leaf * p.columns + at] = pools[k].sum;
        leaf_maxima[leaf * p.columns + at] = pools[k].best.value;
      }
    }
    cluster_meet();
  }

  // The pools of a column, from the leaves of all blocks.
  __device__ Pools<A> column_pools(int64_t column) const {
    const int64_t leaves = ceil_div(p.rows, kLeafRows);
    const auto leaf_pools = [&](int64_t leaf) {
      const int owner = int(leaf / p.block_leaves);
      const int64_t at = leaf % p.block_leaves * p.columns + column;
      return Pools<A>{in_block(leaf_sums, owner)[at], {in_block(leaf_maxima, owner)[at], 0}, A(0), A(0)};
    };
    return total_of_parts<Ties::kNone, false, A>(ceil_div(leaves, kLeavesPerPart), [&](int64_t part) {
      const int64_t begin = part * kLeavesPerPart, end = min(leaves, begin + kLeavesPerPart);
      Pools<A> pools = leaf_pools(begin);
      for (int64_t leaf = begin + 1; leaf < end; ++leaf) pools = merged<Ties::kNone, false>(pools, leaf_pools(leaf));
      return pools;
    });
  }

  __device__ void pool_pixels() const {
    const auto keep = [&](int64_t channel, const Pools<A>& pools) {
      p.descriptors.set_input(pools, sample, channel, false, inputs + channel, input_pitch);
    };
    if constexpr (kChannelsLast) {
      pool_leaves(NoFactors());
      for (int64_t c = share_begin(channels) + thread; c < share_end(channels); c += kResidentThreads)
        keep(c, column_pools(c));
    } else {
      pool_rows(NoFactors(), [&](int64_t row, const Pools<A>& pools) { keep(first_row + row, pools); });
    }
    for (int64_t i = channels + thread; i < input_pitch; i += kResidentThreads)
      for (int branch = 0; branch < p.descriptors.columns; ++branch) inputs[branch * input_pitch + i] = A(0);
    cluster_meet();
    for (int branch = 0; branch < p.descriptors.columns; ++branch)
      gather(inputs + branch * input_pitch, channels, kChannelsLast ? share(channels) : block_rows());
    __syncthreads();
  }

  template <class W>
  __device__ void gate_channels(const Mlp<W>& mlp) const {
    const int64_t reduced = mlp.reduced, begin = share_begin(reduced), end = share_end(reduced);
    const int branches = p.descriptors.columns;
    const LinearLayer<W> first(mlp.weight1, mlp.bias1, reduced, channels);
    linear_layer_in_block(first, begin, end, branches, inputs, input_pitch, [&](int64_t unit, int branch, A product) {
      branch_hidden[branch * hidden_pitch + unit] = hidden_unit(first, unit, product);
    });
    __syncthreads();
    for (int64_t unit = begin + thread; unit < end; unit += kResidentThreads) {
      A sum = 0;
      for (int branch = 0; branch < branches; ++branch) sum += branch_hidden[branch * hidden_pitch + unit];
      hidden[unit] = sum;
    }
    for (int64_t unit = reduced + thread; unit < hidden_pitch; unit += kResidentThreads) hidden[unit] = A(0);
    cluster_meet();
    gather(hidden, reduced, share(reduced));
    __syncthreads();
    const LinearLayer<W> second(mlp.weight2, mlp.bias2, channels, reduced);
    linear_layer_in_block(
        second, kChannelsLast ? share_begin(channels) : first_row,
        kChannelsLast ? share_end(channels) : first_row + rows, 1, hidden, hidden_pitch,
        [&](int64_t channel, int, A product) { gate[channel] = gate_of_channel(second, channel, branches, product); });
    if constexpr (kChannelsLast) {
      cluster_meet();
      gather(gate, channels, share(channels));
    }
    __syncthreads();
  }

  __device__ void pool_channels() const {
    const auto& convolution = p.apply.convolution;
    const auto keep = [&](int64_t pixel, const Pools<A>& pools) {
      const auto at = convolution.finished(pools);
      for (int map = 0; map < convolution.maps.count; ++map) maps[map * pixels + pixel] = convolution.input(at, map);
    };
    const FactorsInBlock<A> factors = {gate};
    if constexpr (kChannelsLast) {
      pool_rows(factors, [&](int64_t row, const Pools<A>& pools) { keep(first_row + row, pools); });
    } else {
      pool_leaves(factors);
      for (int64_t i = share_begin(pixels) + thread; i < share_end(pixels); i += kResidentThreads)
        keep(i, column_pools(i));
    }
    cluster_meet();
    for (int map = 0; map < convolution.maps.count; ++map)
      gather(maps + map * pixels, pixels, kChannelsLast ? block_rows() : share(pixels));
    cluster_meet();  // nobody reads this block's shared memory from here on: it may end
  }

  __device__ void gate_pixels() const {
    const Affine<A> affine(p.apply.norm);
    p.apply.convolution.template convolve<4>(
        kChannelsLast ? int(first_row) : 0, int(kChannelsLast ? rows : pixels), kResidentThreads, sums,
        [&](int i, A logit) { spatial_gate[i] = sigmoid(affine(logit)); },
        [&](int map, int at) { return maps[map * pixels + at]; });
    __syncthreads();
  }

  // By whole vectors, which may reach over the ends of rows.
  __device__ void apply() const {
    const int64_t start = (sample * p.rows + first_row) * p.columns;
    const unsigned columns = unsigned(p.columns);
    for (unsigned i = unsigned(thread * kVector<T>); i < rows * columns; i += kResidentThreads * kVector<T>) {
      const Vector<T> values = *reinterpret_cast<const Vector<T>*>(x + i);
      Vector<T> residual = {}, y;
      if (p.apply.residual) residual = load(reinterpret_cast<const Vector<T>*>(p.apply.residual + start + i));
      unsigned row = i / columns, column = i % columns;
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) {
        const A channel_gate = gate[kChannelsLast ? column : first_row + row];
        A value = to_compute(values.values[k]) * channel_gate * spatial_gate[kChannelsLast ? row : column];
        if (p.apply.residual) value += to_compute(residual.values[k]);
        y.values[k] = rounded<T>(activate(value, p.apply.activation));
        if (++column == columns) {
          column = 0;
          ++row;
        }
      }
      store(reinterpret_cast<Vector<T>*>(p.apply.y + start + i), y);
    }
  }
};

#endif

template <class T, bool kAligned, bool kChannelsLast>
__global__ void __launch_bounds__(kResidentThreads, 2) resident_kernel(Resident<T> p) {
#ifdef CBAM_HAS_CLUSTERS
  DYNAMIC_SHARED(unsigned char, room);
  ResidentBlock<T, kAligned, kChannelsLast>(p, room).run();
#else
  __trap();  // the planner takes it from sm_90 on
#endif
}

template <class T>
auto resident_kernel_for(const Resident<T>& p, const Shape& s) {
  if (p.columns % kVector<T> == 0)
    return s.channels_last ? resident_kernel<T, true, true> : resident_kernel<T, true, false>;
  return s.channels_last ? resident_kernel<T, false, true> : resident_kernel<T, false, false>;
}

template <class T>
Grid resident_grid(const Resident<T>& p, const Shape& s) {
  const size_t room = size_t(ResidentRoom(p, s.channels_last).template bytes<T>());
  return {s.n * p.blocks, kResidentThreads, room, unsigned(p.blocks)};
}

template <class T>
bool resident_fits(const Stream& stream, const Resident<T>& p, const Shape& s) {
  const auto kernel = reinterpret_cast<const void*>(resident_kernel_for(p, s));
  const Grid grid = resident_grid(p, s);
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  thread_local std::map<std::tuple<const void*, int, size_t, unsigned>, bool> known;
  const auto [at, is_new] = known.try_emplace({kernel, device, grid.dynamic_shared, grid.cluster}, false);
  if (is_new) {
    cudaFuncAttributes attributes;
    LaunchConfig config(stream, grid);
    int clusters = 0;
    at->second = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
                 allow_shared(kernel, grid) == cudaSuccess &&
                 (grid.cluster == 1 ||
                  cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.config) == cudaSuccess && clusters > 0);
    cudaGetLastError();  // none of these is an error of a launch
  }
  return at->second;
}

template <class T>
void resident_launch(const Stream& stream, const Resident<T>& p, const Shape& s) {
  launch(stream, "resident", resident_kernel_for(p, s), resident_grid(p, s), p);
}

template void resident_launch(const Stream&, const Resident<float>&, const Shape&);
template void resident_launch(const Stream&, const Resident<__half>&, const Shape&);
template void resident_launch(const Stream&, const Resident<__nv_bfloat16>&, const Shape&);
template bool resident_fits(const Stream&, const Resident<float>&, const Shape&);
template bool resident_fits(const Stream&, const Resident<__half>&, const Shape&);
template bool resident_fits(const Stream&, const Resident<__nv_bfloat16>&, const Shape&);

}  // namespace cbam_fused
