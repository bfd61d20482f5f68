#include "cpu/watch/tree_watch.h"

#include <utility>

#include "cpu/check.h"

namespace distilbert_fast {
namespace {

uint64_t tag_of([[maybe_unused]] PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
  return 0;  // deprecated, and gone from 3.14 on
#endif
}

// In the same order too: another one costs a look at all of it, and no more.
bool same_entries(PyObject* a, PyObject* b) {
  if (PyDict_GET_SIZE(a) != PyDict_GET_SIZE(b)) return false;
  Py_ssize_t at_a = 0, at_b = 0;
  PyObject *key_a, *key_b, *value_a, *value_b;
  while (PyDict_Next(a, &at_a, &key_a, &value_a) && PyDict_Next(b, &at_b, &key_b, &value_b)) {
    if (key_a != key_b || value_a != value_b) return false;
  }
  return true;
}

}  // namespace

TreeWatch::TreeWatch(const std::vector<Dictionary>& dictionaries, const std::vector<PyObject*>& objects,
                     std::vector<Attribute> attributes, const std::vector<PyObject*>& tensors)
    : attributes_(std::move(attributes)) {
  for (const Dictionary& dictionary : dictionaries) {
    for (PyObject* object : {dictionary.live, dictionary.copy}) {
      if (!PyDict_Check(object)) refuse("TreeWatch", "dictionaries must be dicts", Py_TYPE(object)->tp_name);
    }
    dictionaries_.push_back({dictionary, 0});  // compared at the first call, whatever its tag is
  }
  for (PyObject* object : objects) {
    PyObject** place = _PyObject_GetDictPtr(object);
    objects_.push_back({object, Py_TYPE(object), place, place == nullptr ? nullptr : *place});
  }
  for (PyObject* tensor : tensors) tensors_.emplace_back(tensor);
}

bool TreeWatch::holds() {
  for (const Watched& watched : dictionaries_) __builtin_prefetch(watched.dictionary.live);
  for (const Object& object : objects_) {
    __builtin_prefetch(object.object);
    __builtin_prefetch(object.place);
  }
  for (const Attribute& attribute : attributes_) __builtin_prefetch(attribute.owner);
  for (const TorchTensor& tensor : tensors_) tensor.prefetch();

  for (const Object& object : objects_) {
    if (Py_TYPE(object.object) != object.kind) return false;
    if (object.place != nullptr && *object.place != object.attributes) return false;
  }
  for (auto& [dictionary, tag] : dictionaries_) {
    const uint64_t now = tag_of(dictionary.live);
    if (now != 0 && now == tag) continue;
    if (!same_entries(dictionary.live, dictionary.copy)) return false;
    tag = now;
  }
  for (const Attribute& attribute : attributes_) {
    PyObject* value = PyObject_GetAttr(attribute.owner, attribute.name);
    if (value == nullptr) PyErr_Clear();
    Py_XDECREF(value);  // its owner has another reference, or it is not the one
    if (value != attribute.value) return false;
  }
  for (const TorchTensor& tensor : tensors_) {
    if (!tensor.holds()) return false;
  }
  return true;
}

}  // namespace distilbert_fast
