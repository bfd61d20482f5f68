// Has a tree of Python objects changed since it was read? All that a torch model may exchange between two calls:
// entries of dictionaries (a module's children, parameters, hooks and attributes), classes, and what torch counts of
// tensors.
//
// After a call none of this is in the caches, so memory is asked for before it is read: here, and at the end of a call,
// for the next one, by who waits there anyway (fingerprint.h).
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "cpu/watch/torch_tensor.h"

namespace distilbert_fast {

// Owns nothing: whoever made it keeps all objects alive, where Python's garbage collector can see them.
class TreeWatch {
 public:
  struct Dictionary {
    PyObject *live, *copy;
  };

  struct Attribute {
    PyObject *owner, *name, *value;
  };

  // Throws std::invalid_argument for what is no dict, and for a tensor without _version and data_ptr().
  TreeWatch(const std::vector<Dictionary>& dictionaries, const std::vector<PyObject*>& objects,
            const std::vector<Attribute>& attributes, const std::vector<PyObject*>& tensors);

  // Whether every dictionary has the entries of its copy, every object the class and the __dict__ that it had, every
  // attribute its value, and every tensor the memory and the version that it had. Needs the GIL, and keeps it.
  bool holds();

  // Asks for a part of the memory that it reads; needs no GIL, since what is no more is not read.
  static constexpr size_t kParts = 16;
  void prefetch(size_t part) const;

 private:
  struct Watched {
    Dictionary dictionary;
    uint64_t tag;  // CPython's, which each change of the dictionary changes; 0 where it has none

    void prefetch() const { __builtin_prefetch(dictionary.live); }
  };

  struct WatchedAttribute {
    Attribute attribute;
    unsigned tag;  // that of its owner, if this is a class: each change of it or of its bases changes it; 0: unknown
  };

  struct Object {
    PyObject* object;
    PyTypeObject* kind;
    PyObject** place;  // where it keeps its __dict__; null if it has none
    PyObject* attributes;

    void prefetch() const {
      __builtin_prefetch(object);
      __builtin_prefetch(place);
    }
  };

  bool objects_hold();
  bool attributes_hold();
  bool tensors_hold();
  bool dictionaries_hold();

  std::vector<Watched> dictionaries_;
  std::vector<Object> objects_;
  std::vector<WatchedAttribute> attributes_;
  std::vector<TorchTensor> tensors_;
};

}  // namespace distilbert_fast
