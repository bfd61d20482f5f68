// distilbert_fast._cpu: every native CPU entry. Tensors come as addresses, sizes and strides in elements, so the module
// needs no torch to build and serves every torch version. How Python gives pointers and structs: see arguments.h.
#include <array>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "cpu/attention/attention.h"
#include "cpu/buffer.h"
#include "cpu/encoder/encoder.h"
#include "cpu/gemm/gemm_pack.h"
#include "cpu/gemm/matches.h"
#include "cpu/isa/isa.h"
#include "cpu/ops/entries.h"
#include "cpu/ops/kmeans.h"
#include "cpu/watch/fingerprint.h"
#include "cpu/watch/tree_watch.h"

namespace py = pybind11;
using namespace distilbert_fast;

namespace {

// A layer that pack_linear laid out.
struct Blob {
  Weights kind;
  const uint8_t* data;
  int64_t bytes, columns, k;
};

// EncoderLayer, its linear layers still blobs.
using LayerArguments =
    std::tuple<Blob, Blob, Blob, Blob, EncoderNorm, EncoderNorm, int64_t, int64_t, float, float, Address<const float>>;

std::unique_ptr<Encoder> make_encoder(int64_t hidden, int64_t head_size, const std::array<EmbeddingTable, 3>& tables,
                                      const EncoderNorm& first_norm, int64_t padding_idx,
                                      const std::vector<LayerArguments>& layers) {
  const auto linear = [](const Blob& x) { return checked_linear(x.kind, x.data, x.bytes, x.columns, x.k); };
  EncoderModel model = {hidden, head_size, tables[0], tables[1], tables[2], first_norm, padding_idx, {}};
  for (const auto& [qkv, out, ffn_in, ffn_out, attention_norm, ffn_norm, heads, ffn, context_scale, ffn_scale,
                    ffn_factors] : layers) {
    model.layers.push_back({linear(qkv), linear(out), linear(ffn_in), linear(ffn_out), attention_norm, ffn_norm, heads,
                            ffn, context_scale, ffn_scale, ffn_factors});
  }
  return std::make_unique<Encoder>(std::move(model));
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<DType> : FromNumber<DType> {};
template <>
struct type_caster<Weights> : FromNumber<Weights> {};

// Of a class that Python knows, its object, or None for null.
template <class T>
struct FromObject {
  PYBIND11_TYPE_CASTER(Address<T>, make_caster<T>::name);

  bool load(handle source, bool convert) {
    make_caster<T> caster;
    if (!caster.load(source, convert)) return false;
    value = {cast_op<std::remove_const_t<T>*>(caster)};
    return true;
  }
};
template <>
struct type_caster<Address<const LayerMatches>> : FromObject<const LayerMatches> {};
template <>
struct type_caster<Address<Fingerprint>> : FromObject<Fingerprint> {};
template <>
struct type_caster<Address<const TreeWatch>> : FromObject<const TreeWatch> {};
template <>
struct type_caster<Codes> : FromTuple<Codes, uint8_t*, int64_t, uint8_t, float*, const float*, int64_t> {};
template <>
struct type_caster<Normalized> : FromTuple<Normalized, int64_t, const float*, const float*, double, void*, int64_t,
                                           DType, bfloat16*, int64_t, float*, float*, Codes> {};
template <>
struct type_caster<NormalizedGradient> : FromTuple<NormalizedGradient, int64_t, const void*, int64_t, DType,
                                                   const float*, const float*, const float*, void*, DType> {};
template <>
struct type_caster<Lookup> : FromTuple<Lookup, const void*, bool, const void*, int64_t, int64_t, DType> {};
template <>
struct type_caster<CosinePair>
    : FromTuple<CosinePair, const void*, const void*, int64_t, int64_t, DType, DType, const bool*, int64_t> {};
template <class Pointer>
struct type_caster<AttentionTensor<Pointer>> : FromTuple<AttentionTensor<Pointer>, Pointer, int64_t, int64_t, int64_t> {
};
template <>
struct type_caster<EncoderNorm> : FromTuple<EncoderNorm, const float*, const float*, double> {};
template <>
struct type_caster<EmbeddingTable> : FromTuple<EmbeddingTable, const void*, int64_t, DType, const float*> {};
template <>
struct type_caster<Blob> : FromTuple<Blob, Weights, const uint8_t*, int64_t, int64_t, int64_t> {};
template <>
struct type_caster<Fingerprint::Region> : FromTuple<Fingerprint::Region, const uint8_t*, int64_t> {};
template <>
struct type_caster<TreeWatch::Dictionary> : FromTuple<TreeWatch::Dictionary, PyObject*, PyObject*> {};
template <>
struct type_caster<TreeWatch::Attribute> : FromTuple<TreeWatch::Attribute, PyObject*, PyObject*, PyObject*> {};

}  // namespace pybind11::detail

namespace distilbert_fast {

template <>
struct InLine<KlDivLogits> : InLineFields<KlDivLogits, const void*, const void*, int64_t, int64_t, DType, DType,
                                          const bool*, int64_t, int64_t, double> {};
template <>
struct InLine<PackSource>
    : InLineFields<PackSource, const void*, bool, int64_t, int64_t, const float*, const float*, const uint8_t*> {};
template <>
struct InLine<Int8Linear>
    : InLineFields<Int8Linear, const int8_t*, int64_t, int64_t, const float*, int64_t, Weights, const uint8_t*, int64_t,
                   const float*, const float*, int64_t, int64_t, int64_t, bool, const void*, int64_t, bool, void*, int,
                   const float*, int64_t, const LayerMatches*> {};
template <>
struct InLine<LinearProduct>
    : InLineFields<LinearProduct, const void*, DType, int64_t, int64_t, const void*, DType, int64_t, int64_t,
                   const float*, int64_t, int64_t, int64_t, void*, DType, bool> {};
template <>
struct InLine<CodebookLinear>
    : InLineFields<CodebookLinear, const void*, int64_t, DType, const uint8_t*, int64_t, int64_t, const float*, int64_t,
                   int64_t, const float*, int64_t, int64_t, int64_t, void*> {};
template <>
struct InLine<KMeans> : InLineFields<KMeans, const float*, const float*, int64_t, int64_t, int64_t, float*, uint8_t*> {
};
template <>
struct InLine<AttentionSequences> : InLineFields<AttentionSequences, const int32_t*, const bool*, int64_t, int64_t> {};
template <>
struct InLine<AttentionCall> : InLineFields<AttentionCall, AttentionTensor<const void*>, AttentionTensor<const void*>,
                                            AttentionTensor<const void*>, DType, AttentionSequences, int64_t, int64_t,
                                            const float*, int64_t, double, double, uint64_t> {};
template <>
struct InLine<EncoderCall>
    : InLineFields<EncoderCall, const void*, bool, int64_t, int64_t, const void*, int64_t, const int64_t*, int64_t,
                   const int64_t*, int64_t, bool, const float*, int64_t, void*, DType, std::vector<void*>, float*> {};

}  // namespace distilbert_fast

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of distilbert_fast";

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Memory for a large output, kept for the next one of its size")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& buffer) { return py::buffer_info(static_cast<uint8_t*>(buffer.data()), buffer.bytes()); });
  m.def("release_spares", &release_spares, "Free the memory that is kept for the next large outputs; its bytes");

  py::class_<LayerMatches>(m, "LayerMatches",
                           "What int8_linear on AVX2 is faster with: kind, address, bytes, columns, k of a blob")
      .def(py::init([](Weights kind, Address<const uint8_t> blob, int64_t bytes, int64_t columns, int64_t k) {
             return std::make_unique<LayerMatches>(kind, blob, bytes, columns, k);
           }),
           py::call_guard<py::gil_scoped_release>());

  py::class_<Fingerprint>(m, "Fingerprint", "Hashes of memory, (address, bytes) each, which must outlive it")
      .def(py::init<std::vector<Fingerprint::Region>, int64_t>(), py::call_guard<py::gil_scoped_release>())
      .def("matches_samples", &Fingerprint::matches_samples, py::call_guard<py::gil_scoped_release>(),
           "Whether so many samples of the memory, other ones with every call, are what they were, on some threads")
      .def("samples", &Fingerprint::samples, "How many see all of it")
      .def("matches", &Fingerprint::matches, py::call_guard<py::gil_scoped_release>(), "Whether all of it is");

  py::class_<TreeWatch>(
      m, "TreeWatch",
      "Dictionaries and their copies, objects, (owner, name, value) of attributes, and tensors; all of"
      " them must outlive it")
      .def(py::init<const std::vector<TreeWatch::Dictionary>&, const std::vector<PyObject*>&,
                    std::vector<TreeWatch::Attribute>, const std::vector<PyObject*>&>())
      .def("holds", &TreeWatch::holds, "Whether entries, classes and what torch counts of tensors are what they were");

  m.def("isa", &isa, "The instruction set tier in use");
  m.def("set_isa", &set_isa, "Use a tier by name; ValueError if it cannot run here");
  m.def("scalar_by_default", &scalar_by_default, "Whether the scalar tier is in use and nobody has asked for it");
  m.def("available_isas", &available_isas, "Tiers that can run here, highest first");
  m.def("missing_isas", &missing_isas, "Tier -> what this machine lacks for it");

  m.def("kl_div_forward",
        entry([](const KlDivLogits& x, bool mean, float* loss, float* stats, void* gradient, int threads) {
          kl_div_forward({x, 1.0, loss, stats, gradient, false}, mean, threads);
        }),
        "Losses of rows, and their softmax statistics or the gradient (divided by the counted rows if mean)");
  m.def("kl_div_backward",
        entry([](const KlDivLogits& x, const float* dloss, const float* stats, void* gradient, int threads) {
          kl_div_backward({x, dloss, stats, gradient, false}, threads);
        }),
        "Gradient from saved softmax statistics and the upstream gradient of each row");

  m.def("packed_bytes", &packed_bytes,
        "Bytes of packed weights [columns, k]: 0 int8, 1 bfloat16, 2 float32, 3 codebook16");
  m.def("pack_linear", entry(&pack_linear),
        "Lay out a weight matrix, its scales and biases in a blob for the linear kernels");
  m.def("int8_linear", entry(&int8_linear),
        "Linear layer on int8 codes and packed weights, with scales and biases of its own; floats or int8 codes");

  m.def("linear_product", entry(&linear_product), "A Bᵀ + bias of float32 or bfloat16 matrices");
  m.def("codebook_linear", entry(&codebook_linear), "Linear layer on codes of weights that share at most 256 values");
  m.def("kmeans", entry(&kmeans), "Exact k-means of the numbers of each row");
  m.def("multiplies_bfloat16", &multiplies_bfloat16, "Whether the ISA tier in use multiplies bfloat16");
  m.def("prefers_own_gemm", &prefers_own_gemm, "Whether linear_product is faster than torch on this processor");
  m.def("quantize",
        entry([](const void* x, int64_t x_stride, DType x_dtype, int64_t rows, int64_t columns, const Codes& x_q,
                 int threads) { quantize({x, x_stride, x_dtype, columns, x_q}, rows, threads); }),
        "int8 codes of rows by the scales given or by those found");
  m.def("fit_scale",
        entry([](const void* w, int64_t w_stride, DType w_dtype, int64_t rows, int64_t columns, const float* importance,
                 float* scale,
                 int threads) { fit_scale({w, w_stride, w_dtype, columns, importance, scale}, rows, threads); }),
        "The scale of each row by which its int8 codes come nearest to it");
  m.def("layer_norm_forward",
        entry([](const void* x, int64_t x_stride, DType x_dtype, const void* residual, int64_t residual_stride,
                 DType residual_dtype, int64_t rows, const Normalized& out, int threads) {
          layer_norm_forward({x, x_stride, x_dtype, residual, residual_stride, residual_dtype, out}, rows, threads);
        }),
        "LayerNorm of rows of x + residual, and what is wanted of a bfloat16 copy, its statistics and its codes");
  m.def("layer_norm_backward",
        entry([](const void* x, int64_t x_stride, DType x_dtype, const void* residual, int64_t residual_stride,
                 DType residual_dtype, int64_t rows, const NormalizedGradient& gradient, float* dweight, float* dbias,
                 int threads) {
          layer_norm_backward({x, x_stride, x_dtype, residual, residual_stride, residual_dtype, gradient}, rows,
                              dweight, dbias, threads);
        }),
        "Gradients of the sum, weight and bias from the statistics that forward kept");
  m.def("embedding_forward",
        entry([](const Lookup& word, const Lookup& position, const Lookup& token_type, int64_t rows,
                 const Normalized& out,
                 int threads) { embedding_forward({{word, position, token_type}, out}, rows, threads); }),
        "LayerNorm of the sums of looked-up rows");
  m.def("embedding_backward",
        entry([](const Lookup& word, const Lookup& position, const Lookup& token_type, int64_t rows,
                 const NormalizedGradient& gradient, float* dweight, float* dbias, int threads) {
          embedding_backward({{word, position, token_type}, gradient}, rows, dweight, dbias, threads);
        }),
        "Gradients of the sums, weight and bias from the statistics that forward kept");
  m.def("cosine_loss_forward", entry([](const CosinePair& pair, int64_t rows, float* loss, float* stats, int threads) {
          cosine_loss_forward({pair, loss, stats}, rows, threads);
        }),
        "Losses of rows, and their cosines and inverse lengths");
  m.def("cosine_loss_backward",
        entry([](const CosinePair& pair, int64_t rows, const float* dloss, const float* stats, void* gradient,
                 int threads) { cosine_loss_backward({pair, dloss, stats, gradient}, rows, threads); }),
        "Gradient from the cosines and inverse lengths and the upstream gradient of each row");

  m.def("attention_forward",
        entry([](const AttentionCall& call, int64_t tokens, const AttentionTensor<void*>& o, DType o_dtype,
                 int threads) { attention_forward({call, o, o_dtype}, tokens, threads); }),
        "Attention of packed sequences (cu_seqlens, tokens = N) or of padded ones (mask or 0, length)");
  m.def("attention_backward",
        entry([](const AttentionCall& call, int64_t tokens, const AttentionTensor<const void*>& g,
                 const AttentionTensor<void*>& dq, const AttentionTensor<void*>& dk, const AttentionTensor<void*>& dv,
                 float* dm, int threads) { attention_backward({call, g, dq, dk, dv, dm}, tokens, threads); }),
        "Gradients of q, k, v and, where dm is not 0, of the head mask [batch, heads]");

  m.def("linear_kl_div",
        entry([](void* student, const void* teacher, DType student_dtype, DType teacher_dtype, int64_t rows,
                 int64_t kl_rows, int64_t columns, double temperature, const int64_t* labels, bool gradient, float* kl,
                 float* ce, void* ce_gradient, int threads) {
          linear_kl_div({{student, student_dtype, rows, kl_rows, columns, temperature, labels, nullptr, gradient, kl,
                          ce, ce_gradient},
                         teacher,
                         teacher_dtype},
                        threads);
        }),
        "Losses of rows of logits; the gradient of the KL over the student's logits, that of the cross-entropy beside");
  m.def("linear_topk_kl_div",
        entry([](void* student, DType student_dtype, int64_t rows, int64_t kl_rows, int64_t columns, double temperature,
                 const int64_t* ids, const float* log_p, const float* log_tail, int64_t kept, const int64_t* labels,
                 bool gradient, float* kl, float* ce, void* ce_gradient, int threads) {
          linear_topk_kl_div({{student, student_dtype, rows, kl_rows, columns, temperature, labels, nullptr, gradient,
                               kl, ce, ce_gradient},
                              ids,
                              log_p,
                              log_tail,
                              kept},
                             threads);
        }),
        "The same to a teacher's most likely tokens and the mass of all others");

  py::class_<Encoder>(m, "Encoder", "A whole encoder; what its addresses name must outlive it")
      .def(py::init(&make_encoder))
      .def("run",
           entry([](Encoder& encoder, const EncoderCall& call, int threads, Fingerprint* memory, int64_t samples,
                    const TreeWatch* tree) {
             std::optional<Look> look;
             if (memory != nullptr) look.emplace(*memory, samples, tree, threads);
             encoder.run(call, threads, look ? &*look : nullptr);
             return !look || look->holds();
           }),
           "Hidden states [batch, length, C] of ids, 0 at padding that is not computed; whether the next samples of a"
           " Fingerprint's memory are what they were (None: no memory). The next call is going to ask a TreeWatch, or "
           "None");
}
