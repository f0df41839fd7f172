// Many tensors in one launch: a table in the kernel's parameters says which block works on which chunk of
// which tensor. It needs no copy to the device and no cache, and a CUDA graph captures it by value.
#pragma once

#include <vector>

#include "common.cuh"

namespace mopro_fast {

constexpr int CHUNK_THREADS = 256;
// Elements per block: 8 vectors per thread pay for the block's search in the table, and ResNet-50 still makes
// 3,500 blocks, several waves on 132 SMs, so the last wave costs little. Derived, not measured.
constexpr int CHUNK = 8192;
// What kernel parameters may take from CUDA 12.1 on sm_70.
constexpr size_t PARAMETER_BYTES = 32764;

template <size_t POINTERS, size_t TENSORS>
struct Table {
  void* pointer[POINTERS][TENSORS];
  int64_t numel[TENSORS];
  int first_chunk[TENSORS + 1];  // tensor i owns blocks first_chunk[i] to first_chunk[i + 1]
  int tensors;
};

struct Chunk {
  int tensor;
  int64_t begin;
  int count;
};

// This block's chunk.
template <size_t POINTERS, size_t TENSORS>
__device__ Chunk find_chunk(const Table<POINTERS, TENSORS>& table) {
  const int block = blockIdx.x;
  int tensor = 0, end = table.tensors;  // first_chunk[tensor] <= block < first_chunk[end] holds throughout
  while (end - tensor > 1) {
    const int middle = (tensor + end) / 2;
    if (table.first_chunk[middle] <= block) {
      tensor = middle;
    } else {
      end = middle;
    }
  }
  const int64_t begin = static_cast<int64_t>(block - table.first_chunk[tensor]) * CHUNK;
  return {tensor, begin, static_cast<int>(min(table.numel[tensor] - begin, int64_t{CHUNK}))};
}

// Pointer `i` of the chunk's tensor, at the chunk. All chunks of a tensor are equally aligned: CHUNK is a
// multiple of four.
template <typename T, size_t POINTERS, size_t TENSORS>
__device__ T* at_chunk(const Table<POINTERS, TENSORS>& table, const Chunk& chunk, int i) {
  return static_cast<T*>(table.pointer[i][chunk.tensor]) + chunk.begin;
}

// Launches the kernel over all tensors, TENSORS at a time.
template <size_t POINTERS, size_t TENSORS, typename... Args>
void launch_chunks(const char* name, void (*kernel)(Table<POINTERS, TENSORS>, Args...),
                   const std::vector<TensorPointers<POINTERS>>& tensors, cudaStream_t stream, Args... args) {
  static_assert(sizeof(Table<POINTERS, TENSORS>) + (sizeof(Args) + ...) <= PARAMETER_BYTES);
  Table<POINTERS, TENSORS> table;
  table.tensors = 0;
  table.first_chunk[0] = 0;
  auto flush = [&] {
    if (table.tensors == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(table.first_chunk[table.tensors]);
    config.blockDim = dim3(CHUNK_THREADS);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, table, args...), name);
    table.tensors = 0;
  };
  for (const auto& tensor : tensors) {
    if (tensor.numel == 0) continue;
    const int i = table.tensors++;
    for (size_t j = 0; j < POINTERS; ++j) table.pointer[j][i] = tensor.pointer[j];
    table.numel[i] = tensor.numel;
    // An int: 2^31 chunks would be 70 TB of float32.
    table.first_chunk[i + 1] = table.first_chunk[i] + static_cast<int>((tensor.numel + CHUNK - 1) / CHUNK);
    if (table.tensors == static_cast<int>(TENSORS)) flush();
  }
  flush();
}

}  // namespace mopro_fast
