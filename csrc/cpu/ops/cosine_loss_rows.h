// cosine_loss on one row:   loss = 1 − c,   c = s·t a b,   a = 1/√(s·s + ε),  b = 1/√(t·t + ε),
//   d loss / d s = a (a c s − b t).
//
// Forward reads both rows once and makes their three products, added in double block by block, so that 1 − c keeps its
// digits where s and t agree. Backward reads them again and writes the gradient.
#pragma once

namespace distilbert_fast {
namespace {

constexpr double kCosineEpsilon = 1e-12;  // EPSILON of ops/cosine_loss.py
constexpr int64_t kCosineBlock = 64 * Vec::lanes;

struct Products {
  double ss = 0, tt = 0, st = 0;
};

template <class S, class T>
Products products(const S* s, const T* t, int64_t columns) {
  constexpr int64_t lanes = Vec::lanes;
  Products total;
  for (int64_t begin = 0; begin < columns; begin += kCosineBlock) {
    const int64_t end = begin + smaller(kCosineBlock, columns - begin);
    Vec ss[2] = {broadcast(0), broadcast(0)}, tt[2] = {broadcast(0), broadcast(0)},
        st[2] = {broadcast(0), broadcast(0)};
    const auto take = [&](int k, Vec vs, Vec vt) {
      ss[k] = fma(vs, vs, ss[k]);
      tt[k] = fma(vt, vt, tt[k]);
      st[k] = fma(vs, vt, st[k]);
    };
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      take(0, load(s + i), load(t + i));
      take(1, load(s + i + lanes), load(t + i + lanes));
    }
    if (i + lanes <= end) {
      take(0, load(s + i), load(t + i));
      i += lanes;
    }
    if (i < end) take(1, load_first(s + i, end - i, 0), load_first(t + i, end - i, 0));
    total.ss += sum(add(ss[0], ss[1]));
    total.tt += sum(add(tt[0], tt[1]));
    total.st += sum(add(st[0], st[1]));
  }
  return total;
}

// out = p s − q t
template <class S, class T>
void write_difference(const S* s, const T* t, int64_t columns, float p, float q, S* out) {
  constexpr int64_t lanes = Vec::lanes;
  const Vec vp = broadcast(p), vq = broadcast(q);
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) store(out + i, fnma(vq, load(t + i), mul(vp, load(s + i))));
  if (i < columns) {
    const int64_t n = columns - i;
    store_first(out + i, fnma(vq, load_first(t + i, n, 0), mul(vp, load_first(s + i, n, 0))), n);
  }
}

template <class S, class T>
void cosine_forward_rows(const CosineForwardRows& call, int64_t begin, int64_t end) {
  const CosinePair& pair = call.pair;
  for (int64_t r = begin; r < end; ++r) {
    float* stats = call.stats + 3 * r;
    if (pair.mask && !pair.mask[r]) {
      call.loss[r] = stats[0] = stats[1] = stats[2] = 0;
      continue;
    }
    const Products row = products(static_cast<const S*>(pair.student) + r * pair.student_stride,
                                  static_cast<const T*>(pair.teacher) + r * pair.teacher_stride, pair.columns);
    const double a = 1 / __builtin_sqrt(row.ss + kCosineEpsilon), b = 1 / __builtin_sqrt(row.tt + kCosineEpsilon);
    const double c = row.st * a * b;
    call.loss[r] = static_cast<float>(1 - c);
    stats[0] = static_cast<float>(c), stats[1] = static_cast<float>(a), stats[2] = static_cast<float>(b);
  }
}

template <class S, class T>
void cosine_backward_rows(const CosineBackwardRows& call, int64_t begin, int64_t end) {
  const CosinePair& pair = call.pair;
  for (int64_t r = begin; r < end; ++r) {
    S* out = static_cast<S*>(call.gradient) + r * pair.columns;
    if (pair.mask && !pair.mask[r]) {
      write_zeros(out, pair.columns);
      continue;
    }
    const double c = call.stats[3 * r], a = call.stats[3 * r + 1], b = call.stats[3 * r + 2];
    const double scale = a * call.dloss[r];
    write_difference(static_cast<const S*>(pair.student) + r * pair.student_stride,
                     static_cast<const T*>(pair.teacher) + r * pair.teacher_stride, pair.columns,
                     static_cast<float>(scale * a * c), static_cast<float>(scale * b), out);
  }
}

inline void cosine_loss_forward(const CosineForwardRows& call, int64_t begin, int64_t end) {
  with_types(call.pair.student_dtype, call.pair.teacher_dtype,
             [&](auto s, auto t) { cosine_forward_rows<decltype(s), decltype(t)>(call, begin, end); });
}

inline void cosine_loss_backward(const CosineBackwardRows& call, int64_t begin, int64_t end) {
  with_types(call.pair.student_dtype, call.pair.teacher_dtype,
             [&](auto s, auto t) { cosine_backward_rows<decltype(s), decltype(t)>(call, begin, end); });
}

}  // namespace
}  // namespace distilbert_fast
