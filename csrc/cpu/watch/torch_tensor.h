// What torch tells of a tensor: its version, which each write through torch raises, where its memory is, and its sizes
// and strides: `parameter.data = parameter.data.t()` changes neither version nor address.
//
// Python's attributes tell all that in some 500 ns. torch's own library does in 20, without its headers: by functions
// that are looked up by name where torch has them.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace distilbert_fast {

class TorchTensor {
 public:
  // Throws std::invalid_argument for an object without _version, data_ptr(), shape and stride(). `tensor` must outlive
  // it.
  explicit TorchTensor(PyObject* tensor);

  // All need the GIL. Ask for the memory that the others read.
  void prefetch() const;
  // Whether the object is the same tensor, of the same class, not written through torch since. So little that a
  // processor waits for the counters of several at a time: they are where only torch can find them.
  bool version_holds() const;
  // If so, whether its memory is where it was, laid out as it was.
  bool memory_holds() const;

 private:
  static constexpr int64_t kDimensions = 3, kOwnBytes = 32;

  // What Python tells.
  struct State {
    uint64_t version = 0, address = 0;
    std::vector<int64_t> layout;  // sizes, then strides
    bool operator==(const State& other) const {
      return version == other.version && address == other.address && layout == other.layout;
    }
  };
  static bool read(PyObject* tensor, State* state);
  bool holds_directly() const;
  const char* own_bytes() const { return reinterpret_cast<const char*>(object_) + sizeof(PyObject); }

  // All of it in two lines: as cold as torch's memory, and in order with that of the next tensor.
  PyObject* object_;
  PyTypeObject* kind_;
  uint64_t implementation_ = 0, storage_ = 0;  // addresses of torch's C++ objects
  uint64_t version_ = 0, address_ = 0;
  int64_t dimensions_ = 0;
  std::array<int64_t, 2 * kDimensions> layout_{};  // sizes, then strides
  std::array<char, kOwnBytes> own_bytes_{};        // of the Python object, which say which C++ tensor is behind it
  std::unique_ptr<const State> state_;             // instead, where Python must be asked
};

}  // namespace distilbert_fast
