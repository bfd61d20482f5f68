// Which instruction set tier this process uses: the fastest that processor and operating system both grant, or the one
// that was asked for.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// The kernels of the tier in use.
const Kernels& kernels();

std::string isa();
// Whether linear_product is faster than torch's on this processor, as far as that was timed. AMD with
// AVX-512: MKL takes its vectors of float32 only by halves, and under autocast torch copies every weight and every
// gradient.
bool prefers_own_gemm();
// Throws std::invalid_argument for an unknown tier or one that cannot run here, with the reason.
void set_isa(const std::string& name);
// Whether the scalar tier is in use because no other can run here, and nobody has asked for it by set_isa.
bool scalar_by_default();

// Tiers that can run here, highest first; and for each other one what it lacks.
std::vector<std::string> available_isas();
std::map<std::string, std::string> missing_isas();

}  // namespace distilbert_fast
