// What torch tells of a tensor: its version, which each write through torch raises, where its memory is, and its sizes
// and strides: `parameter.data = parameter.data.t()` changes neither version nor address.
//
// Python's attributes tell all that in some 500 ns. torch's own library does in 20, without its headers: by functions
// that are looked up by name where torch has them.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace distilbert_fast {

class TorchTensor {
 public:
  // Throws std::invalid_argument for an object without _version, data_ptr(), shape and stride(). `tensor` must outlive
  // it.
  explicit TorchTensor(PyObject* tensor);

  // Whether the object is the same tensor, neither written through torch nor moved nor laid out anew since.
  bool holds() const;
  // Whether Python has to be asked for that: needs the GIL.
  bool needs_python() const { return !direct_; }
  // Ask for the memory that holds() reads.
  void prefetch() const;

 private:
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

  PyObject* object_;
  State state_;
  std::vector<char> bytes_;                    // of the Python object, which say which C++ tensor is behind it
  uint64_t implementation_ = 0, storage_ = 0;  // addresses of torch's C++ objects
  bool direct_ = false;
};

}  // namespace distilbert_fast
