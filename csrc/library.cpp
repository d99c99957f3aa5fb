// The operations' schemas; cbam_fused/schemas.py has the same texts and says what every argument means.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/kernels.h"

#define CBAM_MLP "Tensor? mlp_weight1, Tensor? mlp_bias1, Tensor mlp_weight2, Tensor? mlp_bias2"
#define CBAM_CONV "Tensor? conv_weight, Tensor? conv_bias"
#define CBAM_NORM "Tensor? norm_weight, Tensor? norm_bias, Tensor? norm_mean, Tensor? norm_var, float eps"

STABLE_TORCH_LIBRARY(cbam_fused, m) {
  m.def("cbam_inference(Tensor x, " CBAM_MLP ", " CBAM_CONV ", " CBAM_NORM
        ", Tensor? residual, str pool, str maps, str activation) -> Tensor");
  m.def("cbam_attend(Tensor x, " CBAM_MLP ", " CBAM_CONV
        ", bool batch_statistics, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum,"
        " str pool, str maps, str ties)"
        " -> (Tensor channel_gate, Tensor descriptors, Tensor hidden, Tensor pixel_ties, Tensor pooled,"
        " Tensor channel_ties, Tensor logits, Tensor norm_mean, Tensor norm_var)");
  m.def("cbam_apply(Tensor x, Tensor channel_gate, Tensor? logits, " CBAM_NORM
        ", Tensor? residual, str activation) -> Tensor");
  m.def("cbam_backward_reduce(Tensor grad, Tensor x, Tensor? y, Tensor channel_gate, Tensor? logits, " CBAM_NORM
        ", str activation)"
        " -> (Tensor masked_grad, Tensor channel_sums, Tensor norm_grad, Tensor norm_sums)");
  m.def(
      "cbam_backward_input(Tensor grad, Tensor x, Tensor channel_gate, Tensor descriptors, Tensor hidden,"
      " Tensor pixel_ties, Tensor pooled, Tensor channel_ties, Tensor? logits, Tensor channel_sums,"
      " Tensor? norm_grad, Tensor? norm_sums, SymInt norm_count, Tensor? mlp_weight1, Tensor mlp_weight2,"
      " Tensor? conv_weight, " CBAM_NORM
      ", str pool, str maps, str ties)"
      " -> (Tensor x_grad, Tensor mlp_weight1_grad, Tensor mlp_bias1_grad, Tensor mlp_weight2_grad,"
      " Tensor mlp_bias2_grad, Tensor conv_weight_grad, Tensor conv_bias_grad)");
  m.def("cpu_capability() -> str");
}

namespace {

std::string cpu_capability() { return cbam_fused::cpu::cpu_capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cbam_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
