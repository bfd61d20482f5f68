#include "cpu/watch/torch_tensor.h"

#include <dlfcn.h>

#include <cstring>

#include "cpu/check.h"

namespace distilbert_fast {
namespace {

constexpr uint64_t kLine = 64;
constexpr int kImplementationLines = 4, kStorageLines = 2;  // of torch's C++ objects, as far as they are read

// at::TensorBase is one pointer, to the implementation; a reference to it is a pointer to that pointer.
using Version = int64_t (*)(const uint64_t* tensor);                      // at::TensorBase::_version() const
using DataPointer = int32_t (*)(const uint64_t* tensor, void** address);  // of torch's stable C interface

template <class Function>
Function torch_function(const char* name) {
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, name));
}
Version version_function() {
  static const auto function = torch_function<Version>("_ZNK2at10TensorBase8_versionEv");
  return function;
}
DataPointer data_pointer_function() {
  static const auto function = torch_function<DataPointer>("aoti_torch_get_data_ptr");
  return function;
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

TorchTensor::TorchTensor(PyObject* tensor) : object_(tensor), implementation_(cdata(tensor)) {
  if (!read(tensor, &state_)) refuse("TorchTensor", "tensor must have a version and memory", Py_TYPE(tensor)->tp_name);
  PyObject* storage = PyObject_CallMethod(tensor, "untyped_storage", nullptr);
  if (storage == nullptr) PyErr_Clear();
  storage_ = cdata(storage);
  Py_XDECREF(storage);
  bytes_.assign(own_bytes(), own_bytes() + Py_TYPE(tensor)->tp_basicsize - sizeof(PyObject));
  const bool found = version_function() != nullptr && data_pointer_function() != nullptr;
  direct_ = implementation_ != 0 && found && read_directly() == state_;
}

bool TorchTensor::read(PyObject* tensor, State* state) {
  static PyObject* const version = PyUnicode_InternFromString("_version");
  static PyObject* const address = PyUnicode_InternFromString("data_ptr");
  return number(tensor, version, false, &state->version) && number(tensor, address, true, &state->address);
}

TorchTensor::State TorchTensor::read_directly() const {
  void* address = nullptr;
  const bool failed = data_pointer_function()(&implementation_, &address) != 0;
  const auto version = static_cast<uint64_t>(version_function()(&implementation_));
  return {version, failed ? UINT64_MAX : reinterpret_cast<uint64_t>(address)};
}

void TorchTensor::prefetch() const {
  __builtin_prefetch(object_);
  prefetch_lines(implementation_, kImplementationLines);
  prefetch_lines(storage_, kStorageLines);
}

bool TorchTensor::holds() const {
  // torch.utils.swap_tensors puts another C++ tensor behind the same object; the one that was there may be gone.
  if (std::memcmp(own_bytes(), bytes_.data(), bytes_.size()) != 0) return false;
  if (direct_) return read_directly() == state_;
  State now;
  return read(object_, &now) && now == state_;
}

}  // namespace distilbert_fast
