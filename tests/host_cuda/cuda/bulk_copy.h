// Stands in for csrc/cuda/bulk_copy.h: a thread that waits spins until the copy is there.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>

namespace rlhf::cuda {

class BulkCopy {
 public:
  static void init(BulkCopy* copies, int count) {
    for (int i = 0; i < count; ++i) copies[i].pending_ = 1;
  }
  void start(void* shared, const void* global, uint32_t bytes) {
    std::memcpy(shared, global, bytes);
    pending_ = 0;
    pending_.notify_all();
  }
  void wait() { pending_.wait(1); }

 private:
  std::atomic<uint64_t> pending_;
};

}  // namespace rlhf::cuda
