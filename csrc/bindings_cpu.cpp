// distilbert_fast._cpu: every native CPU entry. Tensors come as addresses, sizes and strides in elements, so the module
// needs no torch to build and serves every torch version. Address 0 stands for "none".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/attention/attention.h"
#include "cpu/buffer.h"
#include "cpu/encoder/encoder.h"
#include "cpu/gemm/gemm_pack.h"
#include "cpu/isa/isa.h"
#include "cpu/ops/cosine_loss.h"
#include "cpu/ops/embedding.h"
#include "cpu/ops/int8_linear.h"
#include "cpu/ops/kl_div.h"
#include "cpu/ops/layer_norm.h"
#include "cpu/ops/linear.h"
#include "cpu/ops/linear_kl_div.h"
#include "cpu/ops/linear_topk_kl_div.h"
#include "cpu/ops/quantize.h"
#include "cpu/watch/fingerprint.h"
#include "cpu/watch/tree_watch.h"

namespace py = pybind11;
using namespace distilbert_fast;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

KlDivLogits logits(Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
                   int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature) {
  return {at<const void>(student),
          at<const void>(teacher),
          student_stride,
          teacher_stride,
          static_cast<DType>(student_dtype),
          static_cast<DType>(teacher_dtype),
          at<const bool>(mask),
          rows,
          columns,
          temperature};
}

std::vector<PyObject*> pointers(const std::vector<py::handle>& handles) {
  std::vector<PyObject*> found;
  for (const py::handle handle : handles) found.push_back(handle.ptr());
  return found;
}

DType dtype(int code) { return static_cast<DType>(code); }

VocabularyLosses vocabulary_losses(Address student, int student_dtype, int64_t rows, int64_t kl_rows, int64_t columns,
                                   double temperature, Address labels, bool gradient, Address kl, Address ce,
                                   Address ce_gradient) {
  return {at<void>(student), dtype(student_dtype),      rows,    kl_rows,  columns,
          temperature,       at<const int64_t>(labels), nullptr, gradient, at<float>(kl),
          at<float>(ce),     at<void>(ce_gradient)};
}

// data, stride, flip, scale_out, scale_in, stride of scale_in: see Codes.
using CodesArguments = std::tuple<Address, int64_t, int, Address, Address, int64_t>;

Codes codes(const CodesArguments& arguments) {
  const auto [data, stride, flip, scale_out, scale_in, scale_in_stride] = arguments;
  return {at<uint8_t>(data),         stride,         static_cast<uint8_t>(flip), at<float>(scale_out),
          at<const float>(scale_in), scale_in_stride};
}

using Heads = std::array<int64_t, 4>;  // an address, and the strides of sequences, tokens and heads

template <class Pointer>
AttentionTensor<Pointer> heads_at(const Heads& x) {
  return {reinterpret_cast<Pointer>(x[0]), x[1], x[2], x[3]};
}

AttentionCall attention_call(const Heads& q, const Heads& k, const Heads& v, int dtype, Address cu_seqlens,
                             Address mask, int64_t length, int64_t batch, int64_t heads, int64_t head_size,
                             Address head_mask, int64_t head_mask_stride, double scale, double dropout_p,
                             uint64_t seed) {
  return {{at<const int32_t>(cu_seqlens), at<const bool>(mask), length, batch},
          heads,
          head_size,
          heads_at<const void*>(q),
          heads_at<const void*>(k),
          heads_at<const void*>(v),
          static_cast<DType>(dtype),
          at<const float>(head_mask),
          head_mask_stride,
          scale,
          dropout_p,
          seed};
}

// columns, weight, bias, eps, y, stride, dtype, second y, stride, mean, rstd, codes: see Normalized.
using NormalizedArguments = std::tuple<int64_t, Address, Address, double, Address, int64_t, int, Address, int64_t,
                                       Address, Address, CodesArguments>;

Normalized normalized(const NormalizedArguments& arguments) {
  const auto& [columns, weight, bias, eps, y, y_stride, y_dtype, y_low, y_low_stride, mean, rstd, y_codes] = arguments;
  return {
      at<const float>(weight), at<const float>(bias), eps,          columns,         at<void>(y),     y_stride,
      dtype(y_dtype),          at<bfloat16>(y_low),   y_low_stride, at<float>(mean), at<float>(rstd), codes(y_codes)};
}

// columns, dy, stride, dtype, weight, mean, rstd, dh contiguous, dtype: see NormalizedGradient.
using GradientArguments = std::tuple<int64_t, Address, int64_t, int, Address, Address, Address, Address, int>;

NormalizedGradient gradient(const GradientArguments& arguments) {
  const auto [columns, dy, dy_stride, dy_dtype, weight, mean, rstd, dh, dh_dtype] = arguments;
  return {at<const void>(dy),
          dy_stride,
          dtype(dy_dtype),
          at<const float>(weight),
          at<const float>(mean),
          at<const float>(rstd),
          columns,
          at<void>(dh),
          columns,
          dtype(dh_dtype),
          nullptr};
}

// ids, are they int64, table, its rows, stride, dtype: see Lookup.
using LookupArguments = std::tuple<Address, bool, Address, int64_t, int64_t, int>;

Lookup lookup(const LookupArguments& arguments) {
  const auto [ids, wide, table, table_rows, stride, table_dtype] = arguments;
  return {at<const void>(ids), wide, at<const void>(table), table_rows, stride, dtype(table_dtype)};
}

// student, teacher, their strides, their dtypes, mask, columns: see CosinePair.
using PairArguments = std::tuple<Address, Address, int64_t, int64_t, int, int, Address, int64_t>;

CosinePair cosine_pair(const PairArguments& arguments) {
  const auto [student, teacher, student_stride, teacher_stride, student_dtype, teacher_dtype, mask, columns] =
      arguments;
  return {at<const void>(student), at<const void>(teacher), student_stride,       teacher_stride,
          dtype(student_dtype),    dtype(teacher_dtype),    at<const bool>(mask), columns};
}

// weight, bias, eps: see EncoderNorm.
using NormArguments = std::tuple<Address, Address, double>;

EncoderNorm norm(const NormArguments& arguments) {
  const auto [weight, bias, eps] = arguments;
  return {at<const float>(weight), at<const float>(bias), eps};
}

// address, rows, dtype: see EmbeddingTable.
using TableArguments = std::tuple<Address, int64_t, int>;

EmbeddingTable table(const TableArguments& arguments) {
  const auto [data, rows, table_dtype] = arguments;
  return {at<const void>(data), rows, dtype(table_dtype)};
}

// blob, its bytes, columns, k: a layer that pack_linear laid out.
using LinearArguments = std::tuple<Address, int64_t, int64_t, int64_t>;

PackedLinear linear(Weights weights, const LinearArguments& arguments) {
  const auto [blob, bytes, columns, k] = arguments;
  return checked_linear(weights, at<const uint8_t>(blob), bytes, columns, k);
}

// qkv, out, ffn in, ffn out, the two norms, heads, the static scales and factors: see EncoderLayer.
using LayerArguments = std::tuple<LinearArguments, LinearArguments, LinearArguments, LinearArguments, NormArguments,
                                  NormArguments, int64_t, float, float, Address>;

std::unique_ptr<Encoder> make_encoder(int weights, int64_t hidden, int64_t head_size, int64_t ffn,
                                      const std::array<TableArguments, 3>& tables, const NormArguments& first_norm,
                                      int64_t padding_idx, const std::vector<LayerArguments>& layers) {
  EncoderModel model = {static_cast<Weights>(weights),
                        hidden,
                        head_size,
                        ffn,
                        table(tables[0]),
                        table(tables[1]),
                        table(tables[2]),
                        norm(first_norm),
                        padding_idx,
                        {}};
  for (const auto& [qkv, out, ffn_in, ffn_out, attention_norm, ffn_norm, heads, context_scale, ffn_scale, ffn_factors] :
       layers) {
    model.layers.push_back({linear(model.weights, qkv), linear(model.weights, out), linear(model.weights, ffn_in),
                            linear(model.weights, ffn_out), norm(attention_norm), norm(ffn_norm), heads, context_scale,
                            ffn_scale, at<const float>(ffn_factors)});
  }
  return std::make_unique<Encoder>(std::move(model));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of distilbert_fast";

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Memory for a large output, kept for the next one of its size")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& buffer) { return py::buffer_info(static_cast<uint8_t*>(buffer.data()), buffer.bytes()); });
  m.def("release_spares", &release_spares, "Free the memory that is kept for the next large outputs; its bytes");

  py::class_<Fingerprint>(m, "Fingerprint", "Hashes of memory, (address, bytes) each, which must outlive it")
      .def(py::init([](const std::vector<std::tuple<Address, int64_t>>& memory, int64_t lines) {
        std::vector<Fingerprint::Region> regions;
        for (const auto& [address, bytes] : memory) regions.push_back({at<const uint8_t>(address), bytes});
        py::gil_scoped_release release;
        return std::make_unique<Fingerprint>(std::move(regions), lines);
      }))
      .def("matches_sample", &Fingerprint::matches_sample, py::call_guard<py::gil_scoped_release>(),
           "Whether some of the memory, another part with every call, is what it was")
      .def("samples", &Fingerprint::samples, "How many such calls see all of it")
      .def("matches", &Fingerprint::matches, py::call_guard<py::gil_scoped_release>(), "Whether all of it is");

  py::class_<TreeWatch>(
      m, "TreeWatch",
      "Dictionaries and their copies, objects, (owner, name, value) of attributes, and tensors; all of"
      " them must outlive it")
      .def(py::init([](const std::vector<std::pair<py::handle, py::handle>>& dictionaries,
                       const std::vector<py::handle>& objects,
                       const std::vector<std::tuple<py::handle, py::handle, py::handle>>& attributes,
                       const std::vector<py::handle>& tensors) {
        std::vector<TreeWatch::Dictionary> watched;
        for (const auto& [live, copy] : dictionaries) watched.push_back({live.ptr(), copy.ptr()});
        std::vector<TreeWatch::Attribute> values;
        for (const auto& [owner, name, value] : attributes) values.push_back({owner.ptr(), name.ptr(), value.ptr()});
        return std::make_unique<TreeWatch>(watched, pointers(objects), std::move(values), pointers(tensors));
      }))
      .def("holds", &TreeWatch::holds, "Whether entries, classes and what torch counts of tensors are what they were");

  m.def("isa", &isa, "The instruction set tier in use");
  m.def("set_isa", &set_isa, "Use a tier by name; ValueError if it cannot run here");
  m.def("available_isas", &available_isas, "Tiers that can run here, highest first");
  m.def("missing_isas", &missing_isas, "Tier -> what this machine lacks for it");

  m.def(
      "kl_div_forward",
      [](Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
         int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature, bool mean, Address loss,
         Address stats, Address gradient, int threads) {
        const KlDivLogits x = logits(student, teacher, student_stride, teacher_stride, student_dtype, teacher_dtype,
                                     mask, rows, columns, temperature);
        py::gil_scoped_release release;
        kl_div_forward({x, 1.0, at<float>(loss), at<float>(stats), at<void>(gradient), false}, mean, threads);
      },
      "Losses of rows, and their softmax statistics or the gradient (divided by the counted rows if mean)");
  m.def(
      "kl_div_backward",
      [](Address student, Address teacher, int64_t student_stride, int64_t teacher_stride, int student_dtype,
         int teacher_dtype, Address mask, int64_t rows, int64_t columns, double temperature, Address dloss,
         Address stats, Address gradient, int threads) {
        const KlDivLogits x = logits(student, teacher, student_stride, teacher_stride, student_dtype, teacher_dtype,
                                     mask, rows, columns, temperature);
        py::gil_scoped_release release;
        kl_div_backward({x, at<const float>(dloss), at<const float>(stats), at<void>(gradient), false}, threads);
      },
      "Gradient from saved softmax statistics and the upstream gradient of each row");

  m.def(
      "packed_bytes",
      [](int weights, int64_t columns, int64_t k) { return packed_bytes(static_cast<Weights>(weights), columns, k); },
      "Bytes of packed weights [columns, k]: 0 int8, 1 bfloat16, 2 float32");
  m.def(
      "pack_linear",
      [](int weights, Address source, bool is_float32, int64_t row_stride, int64_t column_stride, Address scale,
         Address bias, int64_t columns, int64_t k, Address blob, int64_t blob_bytes) {
        const PackSource from = {at<const void>(source), is_float32,           row_stride, column_stride,
                                 at<const float>(scale), at<const float>(bias)};
        py::gil_scoped_release release;
        pack_linear(static_cast<Weights>(weights), from, columns, k, at<uint8_t>(blob), blob_bytes);
      },
      "Lay out a weight matrix, its scales and biases in a blob for the linear kernels");
  m.def(
      "int8_linear",
      [](Address x, int64_t x_row_stride, int64_t x_column_stride, Address x_scale, int64_t x_scale_stride,
         Address blob, int64_t blob_bytes, Address scale, Address bias, int64_t rows, int64_t columns, int64_t k,
         bool gelu, Address residual, int64_t residual_stride, bool residual_is_bfloat16, Address out, int output,
         Address out_scale, int64_t out_scale_stride, int threads) {
        const Int8Linear call = {at<const int8_t>(x),
                                 x_row_stride,
                                 x_column_stride,
                                 at<const float>(x_scale),
                                 x_scale_stride,
                                 at<const uint8_t>(blob),
                                 blob_bytes,
                                 at<const float>(scale),
                                 at<const float>(bias),
                                 rows,
                                 columns,
                                 k,
                                 gelu,
                                 at<const void>(residual),
                                 residual_stride,
                                 residual_is_bfloat16,
                                 at<void>(out),
                                 output,
                                 at<const float>(out_scale),
                                 out_scale_stride};
        py::gil_scoped_release release;
        int8_linear(call, threads);
      },
      "Linear layer on int8 codes and packed weights, with scales and biases of its own; floats or int8 codes");

  m.def(
      "linear_product",
      [](Address a, int a_dtype, int64_t a_row, int64_t a_step, Address b, int b_dtype, int64_t b_row, int64_t b_step,
         Address bias, int64_t rows, int64_t columns, int64_t k, Address out, int out_dtype, bool add, int threads) {
        const LinearProduct call = {
            at<const void>(a),     dtype(a_dtype), a_row,   a_step, at<const void>(b), dtype(b_dtype),   b_row, b_step,
            at<const float>(bias), rows,           columns, k,      at<void>(out),     dtype(out_dtype), add};
        py::gil_scoped_release release;
        linear_product(call, threads);
      },
      "A Bᵀ + bias of float32 or bfloat16 matrices");
  m.def("multiplies_bfloat16", &multiplies_bfloat16, "Whether the ISA tier in use multiplies bfloat16");
  m.def("prefers_own_gemm", &prefers_own_gemm, "Whether linear_product is faster than torch on this processor");
  m.def(
      "quantize",
      [](Address x, int64_t x_stride, int x_dtype, int64_t rows, int64_t columns, const CodesArguments& x_q,
         int threads) {
        const QuantizeRows call = {at<const void>(x), x_stride, dtype(x_dtype), columns, codes(x_q)};
        py::gil_scoped_release release;
        quantize(call, rows, threads);
      },
      "int8 codes of rows by the scales given or by those found");
  m.def(
      "layer_norm_forward",
      [](Address x, int64_t x_stride, int x_dtype, Address residual, int64_t residual_stride, int residual_dtype,
         int64_t rows, const NormalizedArguments& out, int threads) {
        const LayerNormRows call = {at<const void>(x),        x_stride,        dtype(x_dtype),
                                    at<const void>(residual), residual_stride, dtype(residual_dtype),
                                    normalized(out)};
        py::gil_scoped_release release;
        layer_norm_forward(call, rows, threads);
      },
      "LayerNorm of rows of x + residual, and what is wanted of a bfloat16 copy, its statistics and its codes");
  m.def(
      "layer_norm_backward",
      [](Address x, int64_t x_stride, int x_dtype, Address residual, int64_t residual_stride, int residual_dtype,
         int64_t rows, const GradientArguments& out, Address dweight, Address dbias, int threads) {
        const LayerNormGradientRows call = {
            at<const void>(x),     x_stride,     dtype(x_dtype), at<const void>(residual), residual_stride,
            dtype(residual_dtype), gradient(out)};
        py::gil_scoped_release release;
        layer_norm_backward(call, rows, at<float>(dweight), at<float>(dbias), threads);
      },
      "Gradients of the sum, weight and bias from the statistics that forward kept");
  m.def(
      "embedding_forward",
      [](const LookupArguments& word, const LookupArguments& position, const LookupArguments& token_type, int64_t rows,
         const NormalizedArguments& out, int threads) {
        const EmbeddingRows call = {{lookup(word), lookup(position), lookup(token_type)}, normalized(out)};
        py::gil_scoped_release release;
        embedding_forward(call, rows, threads);
      },
      "LayerNorm of the sums of looked-up rows");
  m.def(
      "embedding_backward",
      [](const LookupArguments& word, const LookupArguments& position, const LookupArguments& token_type, int64_t rows,
         const GradientArguments& out, Address dweight, Address dbias, int threads) {
        const EmbeddingGradientRows call = {{lookup(word), lookup(position), lookup(token_type)}, gradient(out)};
        py::gil_scoped_release release;
        embedding_backward(call, rows, at<float>(dweight), at<float>(dbias), threads);
      },
      "Gradients of the sums, weight and bias from the statistics that forward kept");
  m.def(
      "cosine_loss_forward",
      [](const PairArguments& pair, int64_t rows, Address loss, Address stats, int threads) {
        const CosineForwardRows call = {cosine_pair(pair), at<float>(loss), at<float>(stats)};
        py::gil_scoped_release release;
        cosine_loss_forward(call, rows, threads);
      },
      "Losses of rows, and their cosines and inverse lengths");
  m.def(
      "cosine_loss_backward",
      [](const PairArguments& pair, int64_t rows, Address dloss, Address stats, Address gradient, int threads) {
        const CosineBackwardRows call = {cosine_pair(pair), at<const float>(dloss), at<const float>(stats),
                                         at<void>(gradient)};
        py::gil_scoped_release release;
        cosine_loss_backward(call, rows, threads);
      },
      "Gradient from the cosines and inverse lengths and the upstream gradient of each row");

  m.def(
      "attention_forward",
      [](Heads q, Heads k, Heads v, int dtype, Address cu_seqlens, Address mask, int64_t length, int64_t batch,
         int64_t heads, int64_t head_size, Address head_mask, int64_t head_mask_stride, double scale, double dropout_p,
         uint64_t seed, int64_t tokens, Heads o, int o_dtype, int threads) {
        const AttentionCall call = attention_call(q, k, v, dtype, cu_seqlens, mask, length, batch, heads, head_size,
                                                  head_mask, head_mask_stride, scale, dropout_p, seed);
        py::gil_scoped_release release;
        attention_forward({call, heads_at<void*>(o), static_cast<DType>(o_dtype)}, tokens, threads);
      },
      "Attention of packed sequences (cu_seqlens, tokens = N) or of padded ones (mask or 0, length)");
  m.def(
      "attention_backward",
      [](Heads q, Heads k, Heads v, int dtype, Address cu_seqlens, Address mask, int64_t length, int64_t batch,
         int64_t heads, int64_t head_size, Address head_mask, int64_t head_mask_stride, double scale, double dropout_p,
         uint64_t seed, int64_t tokens, Heads g, Heads dq, Heads dk, Heads dv, Address dm, int threads) {
        const AttentionCall call = attention_call(q, k, v, dtype, cu_seqlens, mask, length, batch, heads, head_size,
                                                  head_mask, head_mask_stride, scale, dropout_p, seed);
        py::gil_scoped_release release;
        attention_backward({call, heads_at<const void*>(g), heads_at<void*>(dq), heads_at<void*>(dk),
                            heads_at<void*>(dv), at<float>(dm)},
                           tokens, threads);
      },
      "Gradients of q, k, v and, where dm is not 0, of the head mask [batch, heads]");

  m.def(
      "linear_kl_div",
      [](Address student, Address teacher, int student_dtype, int teacher_dtype, int64_t rows, int64_t kl_rows,
         int64_t columns, double temperature, Address labels, bool gradient, Address kl, Address ce,
         Address ce_gradient, int threads) {
        const VocabularyLosses losses = vocabulary_losses(student, student_dtype, rows, kl_rows, columns, temperature,
                                                          labels, gradient, kl, ce, ce_gradient);
        py::gil_scoped_release release;
        linear_kl_div({losses, at<const void>(teacher), dtype(teacher_dtype)}, threads);
      },
      "Losses of rows of logits; the gradient of the KL over the student's logits, that of the cross-entropy beside");
  m.def(
      "linear_topk_kl_div",
      [](Address student, int student_dtype, int64_t rows, int64_t kl_rows, int64_t columns, double temperature,
         Address ids, Address log_p, Address log_tail, int64_t kept, Address labels, bool gradient, Address kl,
         Address ce, Address ce_gradient, int threads) {
        const VocabularyLosses losses = vocabulary_losses(student, student_dtype, rows, kl_rows, columns, temperature,
                                                          labels, gradient, kl, ce, ce_gradient);
        py::gil_scoped_release release;
        linear_topk_kl_div({losses, at<const int64_t>(ids), at<const float>(log_p), at<const float>(log_tail), kept},
                           threads);
      },
      "The same to a teacher's most likely tokens and the mass of all others");

  py::class_<Encoder>(m, "Encoder", "A whole encoder; what its addresses name must outlive it")
      .def(py::init(&make_encoder))
      .def(
          "run",
          [](Encoder& encoder, Address ids, bool ids_are_int64, int64_t batch, int64_t length, Address mask,
             int64_t mask_bytes, Address position_ids, int64_t position_stride, Address token_type_ids,
             int64_t token_type_stride, bool padding, Address head_mask, int64_t head_mask_stride, Address out,
             int out_dtype, const std::vector<Address>& hidden_states, Address largest, int threads) {
            std::vector<void*> states;
            for (const Address state : hidden_states) states.push_back(at<void>(state));
            const EncoderCall call = {at<const void>(ids),
                                      ids_are_int64,
                                      batch,
                                      length,
                                      at<const void>(mask),
                                      mask_bytes,
                                      at<const int64_t>(position_ids),
                                      position_stride,
                                      at<const int64_t>(token_type_ids),
                                      token_type_stride,
                                      padding,
                                      at<const float>(head_mask),
                                      head_mask_stride,
                                      at<void>(out),
                                      dtype(out_dtype),
                                      states.empty() ? nullptr : states.data(),
                                      at<float>(largest)};
            py::gil_scoped_release release;
            encoder.run(call, threads);
          },
          "Hidden states [batch, length, C] of ids, 0 at padding that is not computed");
}
