// How much other memory kernels touch before they come back to what they touched before: what a cache must hold for it
// to be there still, if what was used least recently goes first.
//
// It is meant for blocks that run one after the other, in the order of the launch: settings order ascending,
// resident 1.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace simt {

// In a kernel, while settings.count_reuse is set: the block touches a sector of 32 bytes of a tensor. Later touches by
// the same block are not another use.
void note_touch(uintptr_t sector, const std::string& tensor);

// By name of the tensor, of all launches since the last reset: the largest number of bytes, in whole sectors and of all
// tensors, that were touched between two uses of a sector of the tensor; 0 where every sector was used once. What
// another tensor did in the same memory is not a use of this one.
std::map<std::string, uint64_t> reuse();
void reset_reuse();

}  // namespace simt
