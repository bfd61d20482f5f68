// The kernel of int8_linear for compute capability 9.0. Called by int8_linear.cu, which has checked everything.
#pragma once

#include <cuda_runtime.h>

#include "int8_linear.h"

namespace distilbert_fast {

// Whether this build has it: with code for sm_90a.
bool int8_linear_sm90_built();

void int8_linear_sm90(const Int8Linear& call, int device, cudaStream_t stream);

}  // namespace distilbert_fast
