/* The product with packed weights as an operator of PyTorch, by its stable interface: no Python between a compiled graph and the kernel. */
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48)) /* what it needs; newer versions read it too */
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

extern "C" {
#include "call.h"
}

using torch::stable::Tensor;
using Linear = int (*)(const layer *, const void *, const void *, void *, int64_t, int32_t, int32_t);

static Linear linear;

static bool is_half(const Tensor &tensor) { return tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

static const void *data_of(const std::optional<Tensor> &tensor) { return tensor ? tensor->data_ptr() : nullptr; }

static Tensor packed_linear(Tensor input, Tensor kernel, std::optional<Tensor> bias, int64_t rows, int64_t cols, std::optional<Tensor> scale,
                            std::optional<Tensor> input_scale, int64_t group, bool float16, bool integer)
{
    const Tensor x = torch::stable::contiguous(input);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    STD_TORCH_CHECK(linear && !shape.empty() && shape.back() == cols, "the input does not fit the packed weight");
    shape.back() = rows;
    Tensor y = torch::stable::new_empty(x, shape);
    const layer weight = {static_cast<const uint8_t *>(kernel.data_ptr()),
                          static_cast<const float *>(data_of(scale)),
                          static_cast<const float *>(data_of(input_scale)),
                          rows,
                          cols,
                          group,
                          float16,
                          integer};
    const int halves = is_half(x) + 2 * (bias && is_half(*bias));
    const int status = linear(&weight, x.data_ptr(), data_of(bias), y.data_ptr(), x.numel() / cols, halves, static_cast<int32_t>(torch::stable::get_num_threads()));
    STD_TORCH_CHECK(status == 0, "no memory for a product with packed weights");
    return y;
}

/* Give the operator its kernel; once, before it is called. */
extern "C" void optkit_serve(Linear function) { linear = function; }

STABLE_TORCH_LIBRARY_FRAGMENT(optkit, m)
{
    m.def("packed_linear_native(Tensor input, Tensor kernel, Tensor? bias, int rows, int cols, Tensor? scale, Tensor? input_scale, int group, "
          "bool float16, bool integer) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(optkit, CPU, m) { m.impl("packed_linear_native", TORCH_BOX(&packed_linear)); }
