// distilbert_fast._cuda: every native CUDA entry. Tensors come as device addresses, sizes and strides in elements, with
// the device and stream to use, so the module needs neither torch nor a GPU to build and import. How Python gives
// pointers and structs: see arguments.h.
#include "arguments.h"
#include "cuda/entries.h"

using namespace distilbert_fast;

namespace distilbert_fast {

template <>
struct InLine<KlDivLogits> : InLineFields<KlDivLogits, const void*, const void*, int64_t, int64_t, int, int,
                                          const bool*, int64_t, int64_t, double> {};
template <>
struct InLine<KlDivForward> : InLineFields<KlDivForward, KlDivLogits, const float*, float*, float*, void*> {};
template <>
struct InLine<KlDivBackward> : InLineFields<KlDivBackward, KlDivLogits, const float*, const float*, void*> {};
template <>
struct InLine<Int8Linear> : InLineFields<Int8Linear, const int8_t*, int64_t, const float*, int64_t, const int8_t*,
                                         int64_t, const float*, const void*, int, int64_t, int64_t, int64_t, bool,
                                         const void*, int64_t, int, void*, int, const float*, int64_t> {};
template <>
struct InLine<LayerNorm>
    : InLineFields<LayerNorm, const void*, int64_t, const void*, int64_t, int, const void*, const void*, int, int64_t,
                   int64_t, double, void*, float*, float*, int8_t*, float*, const float*, int64_t> {};
template <>
struct InLine<AttentionSequences>
    : InLineFields<AttentionSequences, const int32_t*, const bool*, int64_t, int64_t, int64_t> {};
template <>
struct InLine<AttentionForward>
    : InLineFields<AttentionForward, AttentionCall, AttentionTensor<void*>, AttentionTensor<void*>, float*> {};
template <>
struct InLine<AttentionBackward>
    : InLineFields<AttentionBackward, AttentionCall, AttentionTensor<const void*>, AttentionTensor<const void*>,
                   const float*, float*, AttentionTensor<void*>, AttentionTensor<void*>, AttentionTensor<void*>,
                   float*> {};

}  // namespace distilbert_fast

namespace pybind11::detail {

template <class Pointer>
struct type_caster<AttentionTensor<Pointer>> : FromTuple<AttentionTensor<Pointer>, Pointer, int64_t, int64_t, int64_t> {
};
template <>
struct type_caster<AttentionCall> : FromTuple<AttentionCall, AttentionTensor<const void*>, AttentionTensor<const void*>,
                                              AttentionTensor<const void*>, int, AttentionSequences, int64_t, int64_t,
                                              const float*, int64_t, bool, double, double, const int64_t*> {};

}  // namespace pybind11::detail

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Native CUDA kernels of distilbert_fast";

  m.def("kl_div_forward", entry(&kl_div_forward),
        "Losses of rows, and their softmax statistics or the gradient (times the number at scale)");
  m.def("kl_div_backward", entry(&kl_div_backward),
        "Gradient from saved statistics and the upstream gradient of each row");
  m.def("int8_linear", entry(&int8_linear),
        "Linear layer of int8 codes: exact int32 sums, then scales, bias, GELU, residual, and floats or codes out");
  m.def("layer_norm", entry(&layer_norm), "LayerNorm of the rows of x + residual, and their statistics or int8 codes");
  m.def("attention_forward", entry(&attention_forward),
        "Attention of packed sequences (cu_seqlens, tokens) or of padded ones (mask or 0, length)");
  m.def("attention_backward", entry(&attention_backward),
        "Gradients of q, k, v and, where dm is not 0, of the head mask [batch, heads]");
}
