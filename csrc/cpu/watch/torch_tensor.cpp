#include "cpu/watch/torch_tensor.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/check.h"

namespace distilbert_fast {
namespace {

constexpr uint64_t kLine = 64;
constexpr int kImplementationLines = 4, kStorageLines = 2;  // of torch's C++ objects, as far as they are read

// at::TensorBase is one pointer, to the implementation; a reference to it is a pointer to that pointer.
using Version = int64_t (*)(const uint64_t* tensor);  // at::TensorBase::_version() const
// The others are of torch's stable C interface; what they return is 0 where they succeed.
using DataPointer = int32_t (*)(const uint64_t* tensor, void** address);
using Dimensions = int32_t (*)(const uint64_t* tensor, int64_t* count);
using Numbers = int32_t (*)(const uint64_t* tensor, int64_t** borrowed);

template <class Function>
Function torch_function(const char* name) {
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, name));
}
struct Torch {
  Version version = torch_function<Version>("_ZNK2at10TensorBase8_versionEv");
  DataPointer data_pointer = torch_function<DataPointer>("aoti_torch_get_data_ptr");
  Dimensions dimensions = torch_function<Dimensions>("aoti_torch_get_dim");
  Numbers sizes = torch_function<Numbers>("aoti_torch_get_sizes");
  Numbers strides = torch_function<Numbers>("aoti_torch_get_strides");
  bool found() const { return version && data_pointer && dimensions && sizes && strides; }
};
const Torch& torch() {
  static const Torch functions;
  return functions;
}

// The number that attribute `name` of an object is or, if it is a method, returns; false where there is none.
bool number(PyObject* object, PyObject* name, bool call, uint64_t* value) {
  PyObject* found = call ? PyObject_CallMethodNoArgs(object, name) : PyObject_GetAttr(object, name);
  if (found != nullptr) {
    *value = PyLong_AsUnsignedLongLongMask(found);
    Py_DECREF(found);
  }
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

// The numbers that a sequence holds, appended; consumes the reference.
bool numbers(PyObject* sequence, std::vector<int64_t>* values) {
  PyObject* items = sequence == nullptr ? nullptr : PySequence_Fast(sequence, "");
  Py_XDECREF(sequence);
  for (Py_ssize_t i = 0; items != nullptr && i < PySequence_Fast_GET_SIZE(items); ++i) {
    values->push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items, i)));
  }
  Py_XDECREF(items);
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

// Where torch's C++ object behind a Python object lies; 0 where that is not told.
uint64_t cdata(PyObject* object) {
  static PyObject* const name = PyUnicode_InternFromString("_cdata");
  uint64_t address = 0;
  return object != nullptr && number(object, name, false, &address) ? address : 0;
}

void prefetch_lines(uint64_t first, int lines) {
  for (int i = 0; i < lines && first != 0; ++i) __builtin_prefetch(reinterpret_cast<const void*>(first + i * kLine));
}

}  // namespace

TorchTensor::TorchTensor(PyObject* tensor) : object_(tensor), kind_(Py_TYPE(tensor)), implementation_(cdata(tensor)) {
  State state;
  if (!read(tensor, &state))
    refuse("TorchTensor", "tensor must have a version, memory and a layout", Py_TYPE(tensor)->tp_name);
  PyObject* storage = PyObject_CallMethod(tensor, "untyped_storage", nullptr);
  if (storage == nullptr) PyErr_Clear();
  storage_ = cdata(storage);
  Py_XDECREF(storage);
  version_ = state.version;
  address_ = state.address;
  dimensions_ = static_cast<int64_t>(state.layout.size()) / 2;
  const bool fits = dimensions_ <= kDimensions && Py_TYPE(tensor)->tp_basicsize == kOwnBytes + sizeof(PyObject);
  if (fits) {
    std::copy(state.layout.begin(), state.layout.end(), layout_.begin());
    std::copy(own_bytes(), own_bytes() + kOwnBytes, own_bytes_.begin());
  }
  const bool direct = fits && implementation_ != 0 && torch().found() && version_holds() && holds_directly();
  if (!direct) state_ = std::make_unique<const State>(std::move(state));
}

bool TorchTensor::read(PyObject* tensor, State* state) {
  static PyObject* const version = PyUnicode_InternFromString("_version");
  static PyObject* const address = PyUnicode_InternFromString("data_ptr");
  static PyObject* const shape = PyUnicode_InternFromString("shape");
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  return number(tensor, version, false, &state->version) && number(tensor, address, true, &state->address) &&
         numbers(PyObject_GetAttr(tensor, shape), &state->layout) &&
         numbers(PyObject_CallMethodNoArgs(tensor, stride), &state->layout);
}

bool TorchTensor::holds_directly() const {
  void* address = nullptr;
  int64_t dimensions = 0, *sizes = nullptr, *strides = nullptr;
  const uint64_t* tensor = &implementation_;
  if (torch().data_pointer(tensor, &address) != 0 || torch().dimensions(tensor, &dimensions) != 0 ||
      torch().sizes(tensor, &sizes) != 0 || torch().strides(tensor, &strides) != 0)
    return false;
  const int64_t* layout = layout_.data();
  return reinterpret_cast<uint64_t>(address) == address_ && dimensions == dimensions_ &&
         std::equal(layout, layout + dimensions, sizes) &&
         std::equal(layout + dimensions, layout + 2 * dimensions, strides);
}

void TorchTensor::prefetch() const {
  __builtin_prefetch(object_);
  prefetch_lines(implementation_, kImplementationLines);
  prefetch_lines(storage_, kStorageLines);
}

bool TorchTensor::version_holds() const {
  if (Py_TYPE(object_) != kind_) return false;
  if (state_ != nullptr) return true;  // memory_holds() asks for both
  // torch.utils.swap_tensors puts another C++ tensor behind the same object; the one that was there may be gone.
  return std::memcmp(own_bytes(), own_bytes_.data(), kOwnBytes) == 0 &&
         static_cast<uint64_t>(torch().version(&implementation_)) == version_;
}

bool TorchTensor::memory_holds() const {
  if (state_ != nullptr) {
    State now;
    return read(object_, &now) && now == *state_;
  }
  return holds_directly();
}

}  // namespace distilbert_fast
