#include "cpu/watch/tree_watch.h"

#include <algorithm>

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

// CPython's, which it gives a class when an attribute is looked up, and takes from it when the class or a base changes.
unsigned tag_of_class(PyObject* object) {
  if (!PyType_Check(object)) return 0;
  const auto* type = reinterpret_cast<const PyTypeObject*>(object);
#if PY_VERSION_HEX < 0x030C0000
  if ((type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG) == 0) return 0;
#endif
  return type->tp_version_tag;
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

// holds(x) for all of them, a few at a time: memory is asked for before it is read.
template <class Watched, class Ask, class Holds>
bool all_hold(std::vector<Watched>& watched, const Ask& ask, const Holds& holds) {
  constexpr size_t kAtATime = 64;
  for (size_t begin = 0; begin < watched.size(); begin += kAtATime) {
    const auto first = watched.begin() + static_cast<int64_t>(begin);
    const auto last = first + static_cast<int64_t>(std::min(kAtATime, watched.size() - begin));
    std::for_each(first, last, ask);
    if (!std::all_of(first, last, holds)) return false;
  }
  return true;
}

}  // namespace

TreeWatch::TreeWatch(const std::vector<Dictionary>& dictionaries, const std::vector<PyObject*>& objects,
                     const std::vector<Attribute>& attributes, const std::vector<PyObject*>& tensors) {
  for (const Attribute& attribute : attributes) attributes_.push_back({attribute, 0});  // likewise
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

bool TreeWatch::objects_hold() {
  return all_hold(
      objects_, [](const Object& x) { x.prefetch(); },
      [](const Object& x) { return Py_TYPE(x.object) == x.kind && (x.place == nullptr || *x.place == x.attributes); });
}

bool TreeWatch::attributes_hold() {
  return all_hold(
      attributes_, [](const WatchedAttribute& x) { __builtin_prefetch(x.attribute.owner); },
      [](WatchedAttribute& x) {
        const unsigned now = tag_of_class(x.attribute.owner);
        if (now != 0 && now == x.tag) return true;
        PyObject* value = PyObject_GetAttr(x.attribute.owner, x.attribute.name);
        if (value == nullptr) PyErr_Clear();
        Py_XDECREF(value);  // its owner has another reference, or it is not the one
        x.tag = value == x.attribute.value ? tag_of_class(x.attribute.owner) : 0;
        return value == x.attribute.value;
      });
}

bool TreeWatch::tensors_hold() {
  for (const TorchTensor& x : tensors_) x.prefetch();
  for (const TorchTensor& x : tensors_) {
    if (!x.version_holds()) return false;
  }
  return std::all_of(tensors_.begin(), tensors_.end(), [](const TorchTensor& x) { return x.memory_holds(); });
}

bool TreeWatch::dictionaries_hold() {
  return all_hold(
      dictionaries_, [](const Watched& x) { x.prefetch(); },
      [](Watched& x) {
        const uint64_t now = tag_of(x.dictionary.live);
        if (now != 0 && now == x.tag) return true;
        if (!same_entries(x.dictionary.live, x.dictionary.copy)) return false;
        x.tag = now;
        return true;
      });
}

void TreeWatch::prefetch(size_t part) const {
  const auto ask = [part](const auto& watched) {
    const size_t n = watched.size();
    for (size_t i = part * n / kParts; i < (part + 1) * n / kParts; ++i) watched[i].prefetch();
  };
  ask(objects_);
  ask(tensors_);
  ask(dictionaries_);
}

bool TreeWatch::holds() { return objects_hold() && attributes_hold() && tensors_hold() && dictionaries_hold(); }

}  // namespace distilbert_fast
