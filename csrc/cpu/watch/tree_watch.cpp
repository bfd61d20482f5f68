#include "cpu/watch/tree_watch.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/check.h"
#include "cpu/team.h"
#include "cpu/threads.h"

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

constexpr int64_t kPart = 64;  // dictionaries or tensors, whose memory is asked for before it is read

template <class T>
int64_t size_of(const std::vector<T>& x) {
  return static_cast<int64_t>(x.size());
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
  const auto with_python =
      std::stable_partition(tensors_.begin(), tensors_.end(), [](const TorchTensor& x) { return !x.needs_python(); });
  direct_ = with_python - tensors_.begin();
}

bool TreeWatch::calling_thread_holds() const {
  for (const Object& object : objects_) {
    __builtin_prefetch(object.object);
    __builtin_prefetch(object.place);
  }
  for (const Attribute& attribute : attributes_) __builtin_prefetch(attribute.owner);
  for (const Object& object : objects_) {
    if (Py_TYPE(object.object) != object.kind) return false;
    if (object.place != nullptr && *object.place != object.attributes) return false;
  }
  for (const Attribute& attribute : attributes_) {
    PyObject* value = PyObject_GetAttr(attribute.owner, attribute.name);
    if (value == nullptr) PyErr_Clear();
    Py_XDECREF(value);  // its owner has another reference, or it is not the one
    if (value != attribute.value) return false;
  }
  return std::all_of(tensors_.begin() + direct_, tensors_.end(), [](const TorchTensor& x) { return x.holds(); });
}

int64_t TreeWatch::parts() const { return (size_of(dictionaries_) + direct_ + kPart - 1) / kPart; }

bool TreeWatch::part_holds(int64_t part) {
  const int64_t begin = part * kPart, end = std::min(begin + kPart, size_of(dictionaries_) + direct_);
  const int64_t split = std::clamp(direct_, begin, end);
  for (int64_t i = begin; i < split; ++i) tensors_[i].prefetch();
  for (int64_t i = split; i < end; ++i) __builtin_prefetch(dictionaries_[i - direct_].dictionary.live);
  for (int64_t i = begin; i < split; ++i) {
    if (!tensors_[i].holds()) return false;
  }
  for (int64_t i = split; i < end; ++i) {
    auto& [dictionary, tag] = dictionaries_[i - direct_];
    const uint64_t now = tag_of(dictionary.live);
    if (now != 0 && now == tag) continue;
    if (!same_entries(dictionary.live, dictionary.copy)) return false;
    tag = now;
  }
  return true;
}

TreeWatch::Found TreeWatch::holds(Fingerprint* memory, int64_t count, int threads) {
  const Fingerprint::Samples samples = memory == nullptr ? Fingerprint::Samples{0, 0} : memory->begin_samples(count);
  const int64_t parts_of_memory = memory == nullptr ? 0 : memory->parts();
  std::atomic<int64_t> next{0}, next_of_memory{0};
  std::atomic<bool> tree_holds{true}, memory_holds{true};
  const auto check = [](std::atomic<int64_t>& next, int64_t parts, std::atomic<bool>& holds, const auto& part) {
    for (int64_t i = next++; i < parts && holds.load(std::memory_order_relaxed); i = next++) {
      if (!part(i)) holds.store(false, std::memory_order_relaxed);
    }
  };
  SpinBarrier barrier;
  run_team(usable_threads(threads), [&](int rank, int size) {  // member 0 is the calling thread
    if (rank == 0 && !calling_thread_holds()) tree_holds.store(false, std::memory_order_relaxed);
    check(next, parts(), tree_holds, [&](int64_t i) { return part_holds(i); });
    if (size > 1) barrier.wait(size);
    if (!tree_holds.load(std::memory_order_relaxed)) return;  // memory is read only where tensors still have it
    check(next_of_memory, parts_of_memory, memory_holds, [&](int64_t i) { return memory->part_matches(i, samples); });
  });
  return {tree_holds.load(), tree_holds.load() && memory_holds.load()};
}

}  // namespace distilbert_fast
