// distilbert_fast._cpu: every native CPU entry. Tensors come as addresses, sizes and strides in elements, so the module
// needs no torch to build and serves every torch version. Address 0 stands for "none".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/kl_div.h"
#include "cpu/linear_kl_div.h"

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
  return {at<const void>(student),
          at<const void>(teacher),
          student_stride,
          teacher_stride,
          static_cast<DType>(student_dtype),
          static_cast<DType>(teacher_dtype),
          at<const bool>(mask),
          rows,
          columns,
          temperature};
}

using Heads = std::array<int64_t, 4>;  // an address, and the strides of sequences, tokens and heads

template <class Pointer>
AttentionTensor<Pointer> heads_at(const Heads& x) {
  return {reinterpret_cast<Pointer>(x[0]), x[1], x[2], x[3]};
}

AttentionCall attention_call(const Heads& q, const Heads& k, const Heads& v, int dtype, Address cu_seqlens,
                             Address mask, int64_t length, int64_t batch, int64_t heads, int64_t head_size,
                             Address head_mask, int64_t head_mask_stride, double scale, double dropout_p,
                             uint64_t seed) {
  return {{at<const int32_t>(cu_seqlens), at<const bool>(mask), length, batch},
          heads,
          head_size,
          heads_at<const void*>(q),
          heads_at<const void*>(k),
          heads_at<const void*>(v),
          static_cast<DType>(dtype),
          at<const float>(head_mask),
          head_mask_stride,
          scale,
          dropout_p,
          seed};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of distilbert_fast";

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Memory for a large output, kept for the next one of its size")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& buffer) { return py::buffer_info(static_cast<uint8_t*>(buffer.data()), buffer.bytes()); });

  m.def("isa", &isa, "The instruction set tier in use");
  m.def("set_isa", &set_isa, "Use a tier by name; ValueError if it cannot run here");
  m.def("available_isas", &available_isas, "Tiers that can run here, highest first");
  m.def("missing_isas", &missing_isas, "Tier -> what this machine lacks for it");

  m.def(
      "kl_div_forward",
      [](Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
         int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature, bool mean, Address loss,
         Address stats, Address gradient, int threads) {
        const KlDivLogits x = logits(student, teacher, student_stride, teacher_stride, student_dtype, teacher_dtype,
                                     mask, rows, columns, temperature);
        py::gil_scoped_release release;
        kl_div_forward({x, 1.0, at<float>(loss), at<float>(stats), at<void>(gradient), false}, mean, threads);
      },
      "Losses of rows, and their softmax statistics or the gradient (divided by the counted rows if mean)");
  m.def(
      "kl_div_backward",
      [](Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
         int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature, Address dloss,
         Address stats, Address gradient, int threads) {
        const KlDivLogits x = logits(student, teacher, student_stride, teacher_stride, student_dtype, teacher_dtype,
                                     mask, rows, columns, temperature);
        py::gil_scoped_release release;
        kl_div_backward({x, at<const float>(dloss), at<const float>(stats), at<void>(gradient), false}, threads);
      },
      "Gradient from saved softmax statistics and the upstream gradient of each row");

  m.def(
      "attention_forward",
      [](Heads q, Heads k, Heads v, int dtype, Address cu_seqlens, Address mask, int64_t length, int64_t batch,
         int64_t heads, int64_t head_size, Address head_mask, int64_t head_mask_stride, double scale, double dropout_p,
         uint64_t seed, int64_t tokens, Heads o, int o_dtype, int threads) {
        const AttentionCall call = attention_call(q, k, v, dtype, cu_seqlens, mask, length, batch, heads, head_size,
                                                  head_mask, head_mask_stride, scale, dropout_p, seed);
        py::gil_scoped_release release;
        attention_forward({call, heads_at<void*>(o), static_cast<DType>(o_dtype)}, tokens, threads);
      },
      "Attention of packed sequences (cu_seqlens, tokens = N) or of padded ones (mask or 0, length)");
  m.def(
      "attention_backward",
      [](Heads q, Heads k, Heads v, int dtype, Address cu_seqlens, Address mask, int64_t length, int64_t batch,
         int64_t heads, int64_t head_size, Address head_mask, int64_t head_mask_stride, double scale, double dropout_p,
         uint64_t seed, int64_t tokens, Heads g, Heads dq, Heads dk, Heads dv, Address dm, int threads) {
        const AttentionCall call = attention_call(q, k, v, dtype, cu_seqlens, mask, length, batch, heads, head_size,
                                                  head_mask, head_mask_stride, scale, dropout_p, seed);
        py::gil_scoped_release release;
        attention_backward({call, heads_at<const void*>(g), heads_at<void*>(dq), heads_at<void*>(dk),
                            heads_at<void*>(dv), at<float>(dm)},
                           tokens, threads);
      },
      "Gradients of q, k, v and, where dm is not 0, of the head mask [batch, heads]");

  m.def(
      "linear_kl_div",
      [](Address student, Address teacher, int student_dtype, int teacher_dtype, int64_t rows, int64_t kl_rows,
         int64_t columns, double temperature, Address labels, bool gradient, Address kl, Address ce,
         Address ce_gradient, int threads) {
        py::gil_scoped_release release;
        linear_kl_div(
            {at<void>(student), at<const void>(teacher), static_cast<DType>(student_dtype),
             static_cast<DType>(teacher_dtype), rows, kl_rows, columns, temperature, at<const int64_t>(labels), nullptr,
             gradient, at<float>(kl), at<float>(ce), at<void>(ce_gradient)},
            threads);
      },
      "Losses of rows of logits; the gradient of the KL over the student's logits, that of the cross-entropy beside");
}
