// distilbert_fast._cpu: every native CPU entry. Tensors come as addresses, sizes and strides in elements, so the module
// needs no torch to build and serves every torch version. Address 0 stands for "none".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/buffer.h"
#include "cpu/gemm_pack.h"
#include "cpu/int8_linear.h"
#include "cpu/isa.h"
#include "cpu/kl_div.h"

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
      "packed_bytes",
      [](int weights, int64_t columns, int64_t k) { return packed_bytes(static_cast<Weights>(weights), columns, k); },
      "Bytes of packed weights [columns, k]: 0 int8, 1 bfloat16, 2 float32");
  m.def(
      "pack_linear",
      [](int weights, Address source, bool is_float32, int64_t row_stride, int64_t column_stride, Address scale,
         Address bias, int64_t columns, int64_t k, Address blob, int64_t blob_bytes) {
        const PackSource from = {at<const void>(source), is_float32,           row_stride, column_stride,
                                 at<const float>(scale), at<const float>(bias)};
        py::gil_scoped_release release;
        pack_linear(static_cast<Weights>(weights), from, columns, k, at<uint8_t>(blob), blob_bytes);
      },
      "Lay out a weight matrix, its scales and biases in a blob for the linear kernels");
  m.def(
      "int8_linear",
      [](Address x, int64_t x_row_stride, int64_t x_column_stride, Address x_scale, int64_t x_scale_stride,
         Address blob, int64_t blob_bytes, Address scale, Address bias, int64_t rows, int64_t columns, int64_t k,
         bool gelu, Address residual, int64_t residual_stride, bool residual_is_bfloat16, Address out, int output,
         Address out_scale, int64_t out_scale_stride, int threads) {
        const Int8Linear call = {at<const int8_t>(x),
                                 x_row_stride,
                                 x_column_stride,
                                 at<const float>(x_scale),
                                 x_scale_stride,
                                 at<const uint8_t>(blob),
                                 blob_bytes,
                                 at<const float>(scale),
                                 at<const float>(bias),
                                 rows,
                                 columns,
                                 k,
                                 gelu,
                                 at<const void>(residual),
                                 residual_stride,
                                 residual_is_bfloat16,
                                 at<void>(out),
                                 output,
                                 at<const float>(out_scale),
                                 out_scale_stride};
        py::gil_scoped_release release;
        int8_linear(call, threads);
      },
      "Linear layer on int8 codes and packed weights, with scales and biases of its own; floats or int8 codes");
}
