// Checked entry of embedding: see ops/embedding.py for the contract, embedding_rows.h for the arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throw std::invalid_argument before any table is touched if sizes, pointers or eps make no sense or an id lies
// outside its table.
void embedding_forward(const EmbeddingRows& call, int64_t rows, int threads);
// dweight and dbias are [columns]; call.gradient.sums is not read.
void embedding_backward(const EmbeddingGradientRows& call, int64_t rows, float* dweight, float* dbias, int threads);

}  // namespace distilbert_fast
