// Runs the blocks of a launch: some of them at a time, their threads in turns, in the order of `settings`.
#pragma once

#include <functional>

#include "grid.h"

namespace simt {

constexpr unsigned kMaxResidentBlocks = 128;

// Throws std::runtime_error where the kernel is wrong.
void run(const Launch& what);

void for_resident_blocks(const std::function<void(Block&)>& visit);

}  // namespace simt
