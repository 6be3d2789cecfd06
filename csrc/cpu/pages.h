#pragma once
#include <cstdint>

namespace rlhf::cpu {

// Asks the system for large pages behind fresh memory, which it then maps in one step per 2 MiB instead of one per
// 4 KiB at the first touch. A hint: a system without them leaves the memory as it is.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace rlhf::cpu
