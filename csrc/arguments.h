// How Python's arguments become those of a native function. Included by bindings_*.cpp alone. Python gives
//
//     for a pointer     an integer address, 0 for null; for a PyObject* the object, which whoever keeps it must own
//     for an enum       its number
//     for a struct      a tuple of its fields (FromTuple), or its fields one by one among the other arguments (InLine)
//
// Fields of a struct are named by their types, in its order; trailing ones that have a default may be left out.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace distilbert_fast {

template <class T>
struct Address {
  T* pointer = nullptr;
  operator T*() const { return pointer; }
};

// Which arguments of Python's make a T, and the T of those at `first`: of a plain type, itself.
template <class T>
struct InLine {
  using One = std::conditional_t<std::is_pointer_v<T>, Address<std::remove_pointer_t<T>>, T>;
  using Given = std::tuple<One>;

  template <size_t first, class Values>
  static T take(Values& values) {
    return static_cast<One&&>(std::get<first>(values));
  }
};

// Of a struct, those of its fields: template <> struct InLine<S> : InLineFields<S, types...> {}.
template <class Struct, class... Fields>
struct InLineFields {
  using Given = decltype(std::tuple_cat(std::declval<typename InLine<Fields>::Given>()...));

  template <size_t first, class Values>
  static Struct take(Values& values) {
    return take<first>(values, std::index_sequence_for<Fields...>{});
  }

 private:
  template <size_t first, class Values, size_t... i>
  static Struct take(Values& values, std::index_sequence<i...>) {
    return Struct{InLine<Fields>::template take<first + before(i)>(values)...};
  }
  static constexpr size_t before(size_t field) {
    const size_t sizes[] = {std::tuple_size_v<typename InLine<Fields>::Given>...};
    size_t sum = 0;
    for (size_t i = 0; i < field; ++i) sum += sizes[i];
    return sum;
  }
};

// The caster of a struct that is a tuple in Python: template <> struct type_caster<S> : FromTuple<S, types...> {}.
template <class Struct, class... Fields>
struct FromTuple {
  using Made = InLineFields<Struct, Fields...>;
  using Caster = pybind11::detail::make_caster<typename Made::Given>;
  static constexpr auto name = Caster::name;
  template <class>
  using cast_op_type = Struct;

  bool load(pybind11::handle source, bool convert) { return given.load(source, convert); }
  operator Struct() {
    auto values = pybind11::detail::cast_op<typename Made::Given>(given);
    return Made::template take<0>(values);
  }

  Caster given;
};

template <class Enum>
struct FromNumber {
  using Caster = pybind11::detail::make_caster<int>;
  PYBIND11_TYPE_CASTER(Enum, Caster::name);

  bool load(pybind11::handle source, bool convert) {
    Caster number;
    if (!number.load(source, convert)) return false;
    value = static_cast<Enum>(static_cast<int>(number));
    return true;
  }
};

namespace entries {

template <class T>
struct Plain {
  using type = T;
};
template <class T>
struct Plain<const T&> {
  using type = T;
};

template <class Arguments, class Result, class... Parameters, class... Given>
auto wrap(Result (*function)(Parameters...), std::tuple<Given...>*) {
  return [function](Given... given) {
    std::tuple<Given...> values(std::forward<Given>(given)...);
    auto arguments = Arguments::template take<0>(values);
    pybind11::gil_scoped_release release;
    return std::apply(function, std::move(arguments));
  };
}

template <class Result, class... Parameters>
auto wrap(Result (*function)(Parameters...)) {
  using Values = std::tuple<typename Plain<Parameters>::type...>;
  using Arguments = InLineFields<Values, typename Plain<Parameters>::type...>;
  return wrap<Arguments>(function, static_cast<typename Arguments::Given*>(nullptr));
}

}  // namespace entries

// What m.def() takes to call `function`, or a lambda without captures, on such arguments and without the GIL.
template <class Function>
auto entry(Function function) {
  return entries::wrap(+function);
}

}  // namespace distilbert_fast

namespace pybind11::detail {

template <class T>
struct type_caster<distilbert_fast::Address<T>> {
  PYBIND11_TYPE_CASTER(distilbert_fast::Address<T>, make_caster<uintptr_t>::name);

  bool load(handle source, bool convert) {
    make_caster<uintptr_t> number;
    if (!number.load(source, convert)) return false;
    value = {reinterpret_cast<T*>(static_cast<uintptr_t>(number))};
    return true;
  }
};

template <>
struct type_caster<distilbert_fast::Address<PyObject>> {
  PYBIND11_TYPE_CASTER(distilbert_fast::Address<PyObject>, const_name("object"));

  bool load(handle source, bool) {
    value = {source.ptr()};
    return true;
  }
};

template <class T>
struct type_caster<std::vector<T*>> : list_caster<std::vector<T*>, distilbert_fast::Address<T>> {};

}  // namespace pybind11::detail
