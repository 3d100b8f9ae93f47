// The CPU backend as private ops bcos_kernels_cpp::*, against the LibTorch stable ABI; bcos_kernels/cpu.py calls them.
#include "batch_norm.h"
#include "conv2d_batch_norm.h"
#include "layer_norm.h"
#include "layers.h"
#include "linear_gelu.h"

#define BCOS_LAYER "int mode, float exponent, "
#define BCOS_WINDOW "int s0, int s1, int p0, int p1, int d0, int d1, int groups, "
#define BCOS_KEPT "Tensor? y, Tensor n, Tensor a, Tensor index, "
#define BCOS_OPTIONS "bool normalize_weight, int max_out, "
#define BCOS_NEEDS "bool detach, bool need_dx, bool need_dw, bool need_dbias, bool need_db"
#define BCOS_OUTPUTS " -> (Tensor, Tensor, Tensor, Tensor)"

STABLE_TORCH_LIBRARY(bcos_kernels_cpp, m) {
  // mode: 1 and 2 for B = 1 and 2, 0 for any other B; exponent: B - 1
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? bias, " BCOS_LAYER BCOS_OPTIONS "Tensor? squares, bool keep)" BCOS_OUTPUTS);
  m.def("linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, " BCOS_LAYER BCOS_KEPT BCOS_OPTIONS BCOS_NEEDS
        ")" BCOS_OUTPUTS);
  m.def("conv2d_forward(Tensor x, Tensor weight, Tensor? bias, " BCOS_WINDOW BCOS_LAYER BCOS_OPTIONS
        "Tensor? squares, bool keep)" BCOS_OUTPUTS);
  m.def("conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, " BCOS_WINDOW BCOS_LAYER BCOS_KEPT BCOS_OPTIONS
        BCOS_NEEDS ")" BCOS_OUTPUTS);
  m.def("batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_var, "
        "bool training, float eps, bool relu, bool emits_squares)" BCOS_OUTPUTS);
  m.def("batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
        "bool training, float eps, bool relu, bool detach, bool need_dx, bool need_dweight, bool need_dbias, bool need_dresidual)"
        BCOS_OUTPUTS);
  m.def("layer_norm_forward(Tensor x, int dims, Tensor? weight, Tensor? bias, float eps, bool emits_squares)" BCOS_OUTPUTS);
  m.def("layer_norm_backward(Tensor dy, Tensor x, int dims, Tensor? weight, Tensor mean, Tensor rstd, bool detach, "
        "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_gelu_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? squares, bool normalize_weight, bool keep, "
        "bool emits_squares)" BCOS_OUTPUTS);
  m.def("linear_gelu_again(Tensor y) -> Tensor");
  m.def("linear_gelu_backward(Tensor dh, Tensor x, Tensor weight, Tensor? bias, Tensor y, Tensor n, "
        "bool normalize_weight, bool detach, bool need_dx, bool need_dw, bool need_dbias) -> (Tensor, Tensor, Tensor)");
  m.def("conv2d_batch_norm_forward(Tensor x, Tensor? squares, Tensor weight, Tensor? bias, Tensor? running_var, "
        "Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, " BCOS_WINDOW "bool normalize_weight, bool training, "
        "float eps, bool relu, bool keep, bool detach, bool emits_squares) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv2d_batch_norm_backward(Tensor dz, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, "
        "Tensor? norm_bias, Tensor? z, Tensor? y, Tensor slope, Tensor n, Tensor mean, Tensor var, " BCOS_WINDOW
        "bool normalize_weight, bool training, float eps, bool relu, bool detach, bool need_dx, bool need_dw, "
        "bool need_dbias, bool need_dnorm_weight, bool need_dnorm_bias, bool need_dresidual) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cpp, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&bcos::cpu::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&bcos::cpu::linear_backward));
  m.impl("conv2d_forward", TORCH_BOX(&bcos::cpu::conv2d_forward));
  m.impl("conv2d_backward", TORCH_BOX(&bcos::cpu::conv2d_backward));
  m.impl("batch_norm_forward", TORCH_BOX(&bcos::cpu::batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&bcos::cpu::batch_norm_backward));
  m.impl("layer_norm_forward", TORCH_BOX(&bcos::cpu::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&bcos::cpu::layer_norm_backward));
  m.impl("linear_gelu_forward", TORCH_BOX(&bcos::cpu::linear_gelu_forward));
  m.impl("linear_gelu_again", TORCH_BOX(&bcos::cpu::linear_gelu_again));
  m.impl("linear_gelu_backward", TORCH_BOX(&bcos::cpu::linear_gelu_backward));
  m.impl("conv2d_batch_norm_forward", TORCH_BOX(&bcos::cpu::conv2d_batch_norm_forward));
  m.impl("conv2d_batch_norm_backward", TORCH_BOX(&bcos::cpu::conv2d_batch_norm_backward));
}
