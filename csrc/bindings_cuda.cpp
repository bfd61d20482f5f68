// distilbert_fast._cuda: every native CUDA entry. Tensors come as device addresses, sizes and strides in elements, with
// the device and stream to use, so the module needs neither torch nor a GPU to build and import. Address 0 stands for
// "none".
#include <pybind11/pybind11.h>

#include "cuda/kl_div.h"

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
}
