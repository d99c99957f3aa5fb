// The kernel of the skewed order (see skewed.cuh).
#include "skewed.cuh"

namespace cbam_fused {

template <class T, bool kChannelsLast, Ties ties, bool kApply>
__global__ void __launch_bounds__(kSkewedThreads, 2) skewed_kernel(Skewed<T, kChannelsLast> p) {
  using A = Compute<T>;
  DYNAMIC_SHARED(A, room);
  int64_t block = blockIdx.x;
  if constexpr (kApply) {
    const int64_t blocks = p.apply.samples.count * p.apply_blocks;
    if (block < blocks) return apply<true, kChannelsLast>(p.apply, room, unsigned(block));
    block -= blocks;
  }
  const int64_t gate_blocks = p.gate_blocks(), blocks = p.pool_channels.samples.count * gate_blocks;
  if (block >= blocks) {
    block -= blocks;
    if constexpr (kChannelsLast)
      reduce_columns<true, ties, false>(p.pool_pixels, NoFactors(), block);
    else
      reduce_rows<true, ties, false>(p.pool_pixels, NoFactors(), block);
    return;
  }
  const int64_t within = block % gate_blocks, sample_at = block / gate_blocks;
  const int64_t sample = p.pool_channels.samples[sample_at];
  const bool keep = within == 0;
  p.mlp.visit([&](const auto& mlp) {
    channel_gate_in_block(p.descriptors, mlp, sample, keep, p.hidden, p.channel_gate, room);
  });
  const FactorsInBlock<A> gate = {room};
  const int64_t first = sample_at * p.channel_blocks + within * p.channel_tiles;
  const int64_t end = (sample_at + 1) * p.channel_blocks;
  for (int64_t tile = first; tile < first + p.channel_tiles && tile < end; ++tile) {
    if constexpr (kChannelsLast) {
      reduce_rows<true, ties, false>(p.pool_channels, gate, tile);
    } else {
      if (tile > first) __syncthreads();  // what the last one has in shared memory
      reduce_columns<true, ties, false>(p.pool_channels, gate, tile);
    }
  }
}

template <class T>
int64_t blocks_of_sample(const ReduceRows<T>& p) {
  return p.blocks(kSkewedThreads);
}
template <class T>
int64_t blocks_of_sample(const ReduceColumns<T>& p) {
  return p.blocks();
}

template <Ties ties, bool kApply, class T, bool kChannelsLast>
void skewed_launch(const Stream& stream, Skewed<T, kChannelsLast> p, int64_t samples, int64_t group_samples) {
  p.pixel_blocks = blocks_of_sample(p.pool_pixels);
  p.channel_blocks = blocks_of_sample(p.pool_channels);
  p.apply_blocks = p.apply.tiling.tiles();
  // Weights are about a fourth of what a block reads, or less.
  const int64_t sample_bytes = p.pool_channels.rows * p.pool_channels.columns * int64_t(sizeof(T));
  p.channel_tiles = std::clamp<int64_t>(4 * p.mlp.weight_bytes * p.channel_blocks / sample_bytes, 1, p.channel_blocks);
  const size_t room = std::max(size_t(p.gate_room().size()) * sizeof(Compute<T>), kApply ? p.apply.room() : 0);
  const int64_t groups = ceil_div(samples, group_samples);
  const auto group = [&](int64_t k) {
    const int64_t first = k * group_samples;
    return k < 0 || k >= groups ? Samples{0, 0, false}
                                : Samples{first, std::min(group_samples, samples - first), false};
  };
  for (int64_t step = 0; step < groups + (kApply ? 2 : 1); ++step) {
    p.pool_pixels.samples = group(step);
    p.pool_channels.samples = group(step - 1);
    p.apply.samples = group(step - 2);
    const int64_t blocks = p.pool_pixels.samples.count * p.pixel_blocks +
                           p.pool_channels.samples.count * p.gate_blocks() +
                           (kApply ? p.apply.samples.count * p.apply_blocks : 0);
    launch(stream, "skewed", skewed_kernel<T, kChannelsLast, ties, kApply>, {blocks, kSkewedThreads, room}, p);
  }
}

template void skewed_launch<Ties::kNone, true>(const Stream&, Skewed<float, false>, int64_t, int64_t);
template void skewed_launch<Ties::kNone, true>(const Stream&, Skewed<float, true>, int64_t, int64_t);
template void skewed_launch<Ties::kNone, true>(const Stream&, Skewed<__half, false>, int64_t, int64_t);
template void skewed_launch<Ties::kNone, true>(const Stream&, Skewed<__half, true>, int64_t, int64_t);
template void skewed_launch<Ties::kNone, true>(const Stream&, Skewed<__nv_bfloat16, false>, int64_t, int64_t);
template void skewed_launch<Ties::kNone, true>(const Stream&, Skewed<__nv_bfloat16, true>, int64_t, int64_t);
template void skewed_launch<Ties::kFirst, false>(const Stream&, Skewed<float, false>, int64_t, int64_t);
template void skewed_launch<Ties::kFirst, false>(const Stream&, Skewed<float, true>, int64_t, int64_t);
template void skewed_launch<Ties::kFirst, false>(const Stream&, Skewed<__half, false>, int64_t, int64_t);
template void skewed_launch<Ties::kFirst, false>(const Stream&, Skewed<__half, true>, int64_t, int64_t);
template void skewed_launch<Ties::kFirst, false>(const Stream&, Skewed<__nv_bfloat16, false>, int64_t, int64_t);
template void skewed_launch<Ties::kFirst, false>(const Stream&, Skewed<__nv_bfloat16, true>, int64_t, int64_t);

}  // namespace cbam_fused
