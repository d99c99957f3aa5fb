// torch.ops.simt_sample.*: small operations on which the harness's Python side is tested.
#include <cuda_runtime.h>
#include <platform.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace simt_sample {

using namespace cbam_fused;
using torch::stable::Tensor;

// One warp a row.
__global__ void row_sums_kernel(const float* x,  // [rows, columns]
                                float* sums,     // [rows]
                                int64_t columns) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    const float* p = x + blockIdx.x * columns + i;
    note_load(p, sizeof *p);
    sum += *p;
  }
  for (int by = warpSize / 2; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffff, sum, by);
  if (threadIdx.x > 0 || columns < 0) return;
  note_store(sums + blockIdx.x, sizeof *sums);
  sums[blockIdx.x] = sum;
}

cudaLaunchConfig_t grid(unsigned blocks) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(warpSize);
  return config;
}

// x [rows, columns] fp32 contiguous; result [rows] fp32. `claimed` columns are read: with more than x has, out of
// bounds. Fewer than none: nothing is stored.
Tensor row_sums(Tensor x, int64_t claimed) {
  Tensor sums = torch::stable::new_empty(x, {x.size(0)});
  const auto in = static_cast<const float*>(x.const_data_ptr());
  const auto out = static_cast<float*>(sums.mutable_data_ptr());
  announce(x, "x", false);
  announce(sums, "sums", true);
  const cudaLaunchConfig_t config = grid(x.size(0));
  const cudaError_t status = cudaLaunchKernelEx(&config, row_sums_kernel, in, out, claimed);
  forget_announced();
  STD_TORCH_CHECK(status == cudaSuccess, "row_sums: ", cudaGetErrorString(status));
  return sums;
}

// Every thread of every block stores to one place.
__global__ void race_kernel(float* y) {  // [1]
  note_store(y, sizeof *y);
  *y = 1;
}

__global__ void out_of_bounds_kernel(float* y) {  // [1]
  SHARED_ARRAY(float, values, 1);
  values[threadIdx.x] = threadIdx.x;
  if (threadIdx.x > 0) return;
  note_store(y, sizeof *y);
  *y = values[0];
}

// y [1] fp32, by a kernel with an error: "race" or "out_of_bounds".
Tensor broken(Tensor y, std::string error) {
  const auto out = static_cast<float*>(y.mutable_data_ptr());
  announce(y, "y", false);
  const cudaLaunchConfig_t config = grid(2);
  cudaLaunchKernelEx(&config, error == "race" ? race_kernel : out_of_bounds_kernel, out);
  forget_announced();
  return y;
}

STABLE_TORCH_LIBRARY(simt_sample, m) {
  m.def("row_sums(Tensor x, int claimed) -> Tensor");
  m.def("broken(Tensor(a!) y, str error) -> Tensor(a!)");
}
STABLE_TORCH_LIBRARY_IMPL(simt_sample, CPU, m) {
  m.impl("row_sums", TORCH_BOX(&row_sums));
  m.impl("broken", TORCH_BOX(&broken));
}

}  // namespace simt_sample
