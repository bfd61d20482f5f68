// The sums that a tile of int8 products keeps in registers.
#pragma once

#include <cstdint>

namespace distilbert_fast {
namespace {

// Sums of R rows and two vectors of columns. Members, not an array: gcc keeps these in registers, and not every array.
template <int R, class Tile>
struct Int8Sums {
  using Vector = typename Tile::Vector;
  Int8Sums<R - 1, Tile> before;
  Vector low, high;

  inline __attribute__((always_inline)) void start(Vector from_low, Vector from_high) {
    before.start(from_low, from_high);
    low = from_low;
    high = from_high;
  }
  // add(row, low, high) of each row, in their order.
  template <class Add>
  inline __attribute__((always_inline)) void each_row(const Add& add) {
    before.each_row(add);
    add(R - 1, low, high);
  }
  inline __attribute__((always_inline)) void write(int32_t* out) const {
    before.write(out);
    Vector* const row = reinterpret_cast<Vector*>(out) + (R - 1) * 2;
    row[0] = low;
    row[1] = high;
  }
};

template <class Tile>
struct Int8Sums<0, Tile> {
  using Vector = typename Tile::Vector;
  void start(Vector, Vector) {}
  template <class Add>
  void each_row(const Add&) {}
  void write(int32_t*) const {}
};

}  // namespace
}  // namespace distilbert_fast
