// A linear layer for a few columns of inputs: products of rows of its weight with them.
//
// A group of lanes has kGroupOutputs rows of the weight; a lane adds up its vectors of a row in ascending order, for
// every column, and then the lanes are added. So a value that is loaded serves several products. Inputs come through
// shared memory, kInputChunk at a time. The order follows from the size of the weight and its type alone.
#pragma once

#include "tile.h"

namespace cbam_fused {

constexpr int kLinearThreads = 128;
constexpr int kGroupOutputs = 4;
constexpr int kInputColumns = 8;
constexpr int kInputChunk = 256;

template <class W>
struct LinearLayer {
  const W* weight;  // [outputs, inputs]
  const W* bias;    // [outputs] or null
  int64_t outputs, inputs;
  int lanes;     // of a group
  bool aligned;  // whether rows are whole vectors, at addresses that are multiples of theirs

  __host__ __device__ LinearLayer(const W* weight, const W* bias, int64_t outputs, int64_t inputs)
      : weight(weight),
        bias(bias),
        outputs(outputs),
        inputs(inputs),
        lanes(lanes_for(inputs / (4 * kVector<W>))),
        aligned(inputs % kVector<W> == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0) {}

  __host__ __device__ int block_outputs() const { return kLinearThreads / lanes * kGroupOutputs; }
  int64_t blocks() const { return ceil_div(outputs, block_outputs()); }

  __device__ Vector<W> load_weights(int64_t output, int64_t input) const {
    Vector<W> vector = {};
    if (output >= outputs) return vector;
    const W* source = weight + output * inputs + input;
    if (aligned) return load(reinterpret_cast<const Vector<W>*>(source));
#pragma unroll
    for (int i = 0; i < kVector<W>; ++i)
      if (input + i < inputs) vector.values[i] = load(source + i);
    return vector;
  }
};

// The products of the rows of block `block` with kInputColumns columns of inputs: calls use(output, column, product),
// by one thread for each. All threads of the block call load_inputs(first, count, target) for inputs first, ..., first
// + count - 1 of every column: target [kInputColumns, kInputChunk], where columns that do not exist are left alone.
// `room` is kInputColumns * kInputChunk numbers of shared memory.
template <class W, class LoadInputs, class Use>
__device__ inline void linear_layer(const LinearLayer<W>& layer, int64_t block, Compute<W>* room,
                                    LoadInputs load_inputs, Use use) {
  using A = Compute<W>;
  const int thread = int(threadIdx.x), lane = thread % layer.lanes, group = thread / layer.lanes;
  const int64_t first_output = block * layer.block_outputs() + group * kGroupOutputs;
  A products[kGroupOutputs][kInputColumns] = {};
  for (int64_t first = 0; first < layer.inputs; first += kInputChunk) {
    const int count = int(layer.inputs - first < kInputChunk ? layer.inputs - first : kInputChunk);
    __syncthreads();
    if (first == 0 || count < kInputChunk) {  // what lies behind the inputs is multiplied too
      for (int i = thread; i < kInputColumns * kInputChunk; i += kLinearThreads) room[i] = A(0);
      __syncthreads();
    }
    load_inputs(first, count, room);
    __syncthreads();
    for (int input = lane * kVector<W>; input < count; input += layer.lanes * kVector<W>) {
      Vector<W> weights[kGroupOutputs];
#pragma unroll
      for (int k = 0; k < kGroupOutputs; ++k) weights[k] = layer.load_weights(first_output + k, first + input);
#pragma unroll
      for (int column = 0; column < kInputColumns; ++column) {
#pragma unroll
        for (int i = 0; i < kVector<W>; ++i) {
          const A value = room[column * kInputChunk + input + i];
#pragma unroll
          for (int k = 0; k < kGroupOutputs; ++k)
            products[k][column] = std::fma(to_compute(weights[k].values[i]), value, products[k][column]);
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kGroupOutputs; ++k) {
#pragma unroll
    for (int column = 0; column < kInputColumns; ++column) {
      const A product = group_sum(products[k][column], layer.lanes);
      if ((k * kInputColumns + column) % layer.lanes == lane && first_output + k < layer.outputs)
        use(first_output + k, column, product);
    }
  }
}

// The products of rows [begin, end) with a few columns of inputs that are in shared memory, [columns, apart], apart a
// multiple of 8, at an address that is a multiple of 16 bytes; zero behind the inputs of each. Bitwise those of
// linear_layer: calls use(output, column, product), by one thread for each. All threads of the block, whole warps,
// call.
template <class W, class Use>
__device__ inline void linear_layer_in_block(const LinearLayer<W>& layer, int64_t begin, int64_t end, int columns,
                                             const Compute<W>* inputs, int apart, Use use) {
  using A = Compute<W>;
  const int lane = int(threadIdx.x) % layer.lanes, group = int(threadIdx.x) / layer.lanes;
  const int groups = int(blockDim.x) / layer.lanes;
  for (int64_t first = begin * columns; first < end * columns; first += groups) {
    const int64_t output = (first + group) / columns;
    const int column = int((first + group) % columns);
    const A* values = inputs + column * apart;
    A product = 0;
    if (output < end)
      for (int64_t input = lane * kVector<W>; input < layer.inputs; input += layer.lanes * kVector<W>) {
        const Vector<W> weights = layer.load_weights(output, input);
#pragma unroll
        for (int first = 0; first < kVector<W>; first += kVector<A>) {  // whole vectors, without bank conflicts
          const Vector<A> own = *reinterpret_cast<const Vector<A>*>(values + input + first);
#pragma unroll
          for (int i = 0; i < kVector<A>; ++i)
            product = std::fma(to_compute(weights.values[first + i]), own.values[i], product);
        }
      }
    product = group_sum(product, layer.lanes);
    if (lane == 0 && output < end) use(output, column, product);
  }
}

}  // namespace cbam_fused
