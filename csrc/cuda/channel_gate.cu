// The kernels of the channel gate (see channel_gate.cuh).
#include "channel_gate.cuh"

namespace cbam_fused {

// ---- Kernels --------------------------------------------------------------------------------------------------------

template <class W>
__global__ void __launch_bounds__(kLinearThreads) hidden_kernel(Descriptors<Compute<W>> descriptors,
                                                                LinearLayer<W> layer,  // W1 [R, C]
                                                                Compute<W>* hidden) {  // [N, B, R], out
  using A = Compute<W>;
  SHARED_ARRAY(A, room, kInputColumns * kInputChunk);
  const int64_t groups = ceil_div(descriptors.samples, kInputColumns / descriptors.columns);
  const int64_t block = blockIdx.x / groups, group = blockIdx.x % groups;
  const int branches = descriptors.columns, group_columns = kInputColumns / branches * branches;
  linear_layer(
      layer, block, room,
      [&](int64_t first, int count, A* target) { descriptors.load_inputs(group, block == 0, first, count, target); },
      [&](int64_t unit, int column, A product) {
        const int64_t row = group * group_columns + column;  // of [N * B]
        if (column >= group_columns || row >= descriptors.samples * branches) return;
        store(hidden + row * layer.outputs + unit, hidden_unit(layer, unit, product));
      });
}

template <class W>
__global__ void __launch_bounds__(kLinearThreads) channel_gate_kernel(Descriptors<Compute<W>> descriptors,
                                                                      LinearLayer<W> layer,      // W2 [C, R], or [C, C]
                                                                      const Compute<W>* hidden,  // [N, B, R] or null
                                                                      Compute<W>* channel_gate) {  // [N, C], out
  using A = Compute<W>;
  SHARED_ARRAY(A, room, kInputColumns * kInputChunk);
  const int64_t samples = descriptors.samples, groups = ceil_div(samples, kInputColumns);
  const int64_t block = blockIdx.x / groups, group = blockIdx.x % groups;
  const int branches = int(descriptors.pool.branches());
  linear_layer(
      layer, block, room,
      [&](int64_t first, int count, A* target) {
        if (!hidden) return descriptors.load_inputs(group, block == 0, first, count, target);
        for (int i = int(threadIdx.x); i < kInputColumns * count; i += kLinearThreads) {
          const int64_t sample = group * kInputColumns + i / count;
          if (sample >= samples) break;
          A sum = 0;
          for (int branch = 0; branch < branches; ++branch)
            sum += load(hidden + (sample * branches + branch) * layer.inputs + first + i % count);
          target[i / count * kInputChunk + i % count] = sum;
        }
      },
      [&](int64_t channel, int column, A product) {
        const int64_t sample = group * kInputColumns + column;
        if (sample >= samples) return;
        store(channel_gate + sample * layer.outputs + channel, gate_of_channel(layer, channel, branches, product));
      });
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

template <class W>
void channel_gate_launch(const Stream& stream, const Descriptors<Compute<W>>& descriptors, const Mlp<W>& mlp,
                         Compute<W>* hidden,          // [N, B, R], out
                         Compute<W>* channel_gate) {  // [N, C], out
  const int64_t channels = descriptors.channels;
  if (mlp.weight1) {
    const LinearLayer<W> layer(mlp.weight1, mlp.bias1, mlp.reduced, channels);
    launch(stream, "hidden", hidden_kernel<W>, {layer.blocks() * descriptors.sample_groups(), kLinearThreads},
           descriptors, layer, hidden);
  }
  const LinearLayer<W> layer(mlp.weight2, mlp.bias2, channels, mlp.weight1 ? mlp.reduced : channels);
  launch(stream, "channel_gate", channel_gate_kernel<W>,
         {layer.blocks() * ceil_div(descriptors.samples, kInputColumns), kLinearThreads}, descriptors, layer,
         mlp.weight1 ? hidden : nullptr, channel_gate);
}

template void channel_gate_launch(const Stream&, const Descriptors<float>&, const Mlp<float>&, float*, float*);
template void channel_gate_launch(const Stream&, const Descriptors<double>&, const Mlp<double>&, double*, double*);
template void channel_gate_launch(const Stream&, const Descriptors<float>&, const Mlp<__half>&, float*, float*);
template void channel_gate_launch(const Stream&, const Descriptors<float>&, const Mlp<__nv_bfloat16>&, float*, float*);

}  // namespace cbam_fused
