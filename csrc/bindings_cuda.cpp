// distilbert_fast._cuda: every native CUDA entry. Tensors come as device addresses, sizes and strides in elements, with
// the device and stream to use, so the module needs neither torch nor a GPU to build and import. Address 0 stands for
// "none".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/attention.h"
#include "cuda/int8_linear.h"
#include "cuda/kl_div.h"
#include "cuda/layer_norm.h"

namespace py = pybind11;
using namespace distilbert_fast;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

KlDivLogits logits(Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
                   int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature) {
  return {at<const void>(student), at<const void>(teacher), student_stride, teacher_stride, student_dtype,
          teacher_dtype,           at<const bool>(mask),    rows,           columns,        temperature};
}

// Address and strides of sequences, tokens and heads.
using Heads = std::array<int64_t, 4>;

template <class Pointer>
AttentionTensor<Pointer> heads_at(const Heads& x) {
  return {reinterpret_cast<Pointer>(x[0]), x[1], x[2], x[3]};
}

// q, k, v, dtype, cu_seqlens, mask, tokens, length, batch, heads, head_size, head_mask, its stride, every_head, scale,
// dropout_p, seed: see AttentionCall.
using AttentionArguments = std::tuple<Heads, Heads, Heads, int, Address, Address, int64_t, int64_t, int64_t, int64_t,
                                      int64_t, Address, int64_t, bool, double, double, Address>;

AttentionCall attention_call(const AttentionArguments& arguments) {
  const auto& [q, k, v, dtype, cu_seqlens, mask, tokens, length, batch, heads, head_size, head_mask, head_mask_stride,
               every_head, scale, dropout_p, seed] = arguments;
  return {{at<const int32_t>(cu_seqlens), at<const bool>(mask), tokens, length, batch},
          heads,
          head_size,
          heads_at<const void*>(q),
          heads_at<const void*>(k),
          heads_at<const void*>(v),
          dtype,
          at<const float>(head_mask),
          head_mask_stride,
          every_head,
          scale,
          dropout_p,
          at<const int64_t>(seed)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Native CUDA kernels of distilbert_fast";

  m.def(
      "kl_div_forward",
      [](Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
         int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature, Address scale,
         Address loss, Address stats, Address gradient, int device, Address stream) {
        const KlDivLogits x = logits(student, teacher, student_stride, teacher_stride, student_dtype, teacher_dtype,
                                     mask, rows, columns, temperature);
        py::gil_scoped_release release;
        kl_div_forward({x, at<const float>(scale), at<float>(loss), at<float>(stats), at<void>(gradient)}, device,
                       at<void>(stream));
      },
      "Losses of rows, and their softmax statistics or the gradient (times the number at scale)");
  m.def(
      "kl_div_backward",
      [](Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
         int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature, Address dloss,
         Address stats, Address gradient, int device, Address stream) {
        const KlDivLogits x = logits(student, teacher, student_stride, teacher_stride, student_dtype, teacher_dtype,
                                     mask, rows, columns, temperature);
        py::gil_scoped_release release;
        kl_div_backward({x, at<const float>(dloss), at<const float>(stats), at<void>(gradient)}, device,
                        at<void>(stream));
      },
      "Gradient from saved statistics and the upstream gradient of each row");
  m.def(
      "int8_linear",
      [](Address x, int64_t x_stride, Address x_scale, int64_t x_scale_stride, Address w, int64_t w_stride,
         Address w_scale, Address bias, int bias_dtype, int64_t rows, int64_t columns, int64_t depth, bool gelu,
         Address residual, int64_t residual_stride, int residual_dtype, Address y, int y_dtype, Address out_scale,
         int64_t out_scale_stride, int device, Address stream) {
        py::gil_scoped_release release;
        int8_linear({at<const int8_t>(x),
                     x_stride,
                     at<const float>(x_scale),
                     x_scale_stride,
                     at<const int8_t>(w),
                     w_stride,
                     at<const float>(w_scale),
                     at<const void>(bias),
                     bias_dtype,
                     rows,
                     columns,
                     depth,
                     gelu,
                     at<const void>(residual),
                     residual_stride,
                     residual_dtype,
                     at<void>(y),
                     y_dtype,
                     at<const float>(out_scale),
                     out_scale_stride},
                    device, at<void>(stream));
      },
      "Linear layer of int8 codes: exact int32 sums, then scales, bias, GELU, residual, and floats or codes out");
  m.def(
      "layer_norm",
      [](Address x, int64_t x_stride, Address residual, int64_t residual_stride, int dtype, Address weight,
         Address bias, int parameter_dtype, int64_t rows, int64_t columns, double eps, Address y, Address mean,
         Address rstd, Address codes, Address scale_out, Address scale_in, int64_t scale_in_stride, int device,
         Address stream) {
        py::gil_scoped_release release;
        layer_norm(
            {at<const void>(x), x_stride, at<const void>(residual), residual_stride, dtype, at<const void>(weight),
             at<const void>(bias), parameter_dtype, rows, columns, eps, at<void>(y), at<float>(mean), at<float>(rstd),
             at<int8_t>(codes), at<float>(scale_out), at<const float>(scale_in), scale_in_stride},
            device, at<void>(stream));
      },
      "LayerNorm of the rows of x + residual, and their statistics or int8 codes");
  m.def(
      "attention_forward",
      [](const AttentionArguments& arguments, Heads o, Heads unmasked, Address stats, int device, Address stream) {
        const AttentionCall call = attention_call(arguments);
        py::gil_scoped_release release;
        attention_forward({call, heads_at<void*>(o), heads_at<void*>(unmasked), at<float>(stats)}, device,
                          at<void>(stream));
      },
      "Attention of packed sequences (cu_seqlens, tokens) or of padded ones (mask or 0, length)");
  m.def(
      "attention_backward",
      [](const AttentionArguments& arguments, Heads g, Heads o, Address stats, Address r, Heads dq, Heads dk, Heads dv,
         Address dm, int device, Address stream) {
        const AttentionCall call = attention_call(arguments);
        py::gil_scoped_release release;
        attention_backward({call, heads_at<const void*>(g), heads_at<const void*>(o), at<const float>(stats),
                            at<float>(r), heads_at<void*>(dq), heads_at<void*>(dk), heads_at<void*>(dv), at<float>(dm)},
                           device, at<void>(stream));
      },
      "Gradients of q, k, v and, where dm is not 0, of the head mask [batch, heads]");
}
