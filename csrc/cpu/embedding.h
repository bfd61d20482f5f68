// Checked entry of embedding: see ops/embedding.py for the contract, embedding_rows.h for the arithmetic.
#pragma once

#include "kernels.h"

namespace distilbert_fast {

// Throws std::invalid_argument before any table is touched if sizes, pointers or eps make no sense or an id lies
// outside its table.
void embedding_forward(const EmbeddingRows& call, int64_t rows, int threads);

}  // namespace distilbert_fast
