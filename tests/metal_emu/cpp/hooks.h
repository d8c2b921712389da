// What compiled kernels call: the thread sanitizer's hooks, which are ours (libtsan is not linked), the bounds
// sanitizer's handler, and the shim's collectives, barriers, atomics and threadgroup variables.
#pragma once
#include "memory.h"

#define CALLER __builtin_return_address(0)

#define ACCESS_HOOK(NAME, SIZE, WRITE, ALIGNED)                                                                        \
  void __tsan_##NAME##SIZE(void* p) { access((uint8_t*)p, SIZE, WRITE, false, CALLER, ALIGNED); }
#define ACCESS_HOOKS(SIZE)                                                                                             \
  ACCESS_HOOK(read, SIZE, false, true)                                                                                 \
  ACCESS_HOOK(write, SIZE, true, true)                                                                                 \
  ACCESS_HOOK(volatile_read, SIZE, false, true)                                                                        \
  ACCESS_HOOK(volatile_write, SIZE, true, true)                                                                        \
  ACCESS_HOOK(unaligned_read, SIZE, false, false)                                                                      \
  ACCESS_HOOK(unaligned_write, SIZE, true, false)

extern "C" {

ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)

void __tsan_read_range(void* p, size_t n) { access((uint8_t*)p, n, false, false, CALLER, false); }
void __tsan_write_range(void* p, size_t n) { access((uint8_t*)p, n, true, false, CALLER, false); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

struct SanitizerLocation {
  const char* file;
  uint32_t line, column;
};

void __ubsan_handle_out_of_bounds_abort(void* data, uintptr_t index) {
  auto* at = (SanitizerLocation*)data;
  report(ARRAY_BOUNDS, nullptr, at->line, "index %lld is outside the array (%s:%u:%u)", (long long)index, at->file,
         at->line, at->column);
  die();
}

uint32_t msl_lane() { return current->lane; }

uint32_t msl_simd_mask() {
  const uint32_t first = current->simdgroup * 32u;
  uint32_t mask = 0;
  for (uint32_t i = first; i < threads && i < first + 32; i++)
    if (fibers[i].state != DONE) mask |= 1u << fibers[i].lane;
  return mask;
}

void msl_misuse(const char* what) { report(MISUSE, nullptr, 0, "%s", what); }

static void wait_in(State state, LaneFn fn, void* arg, const char* what, uint32_t flags, int line) {
  Fiber* f = current;
  f->state = state;
  f->fn = fn;
  f->arg = arg;
  f->what = what;
  f->line = line;
  f->flags = flags;
  to_scheduler();
}

void msl_collective(int width, LaneFn fn, void* arg, const char* what, int line) {
  wait_in(width == 4 ? QUAD : SIMD, fn, arg, what, 0, line);
}

void msl_barrier(int scope, uint32_t flags, int line) {
  if (scope)
    wait_in(BARRIER, nullptr, nullptr, "threadgroup_barrier", flags, line);
  else
    wait_in(SIMD, nullptr, nullptr, "simdgroup_barrier", flags, line);
}

void msl_atomic(const volatile void* p, size_t size, bool write) {
  if (launch->check) access((uint8_t*)p, size, write, true, CALLER, true);
}

void* msl_tg_alloc(const void* key, size_t size, size_t align, const char* name, int line) {
  for (auto& v : tg_variables)
    if (v.key == key) return tg_memory + v.offset;
  const size_t red_zone = 16, unit = align < 16 ? 16 : align;
  size_t offset = 0;
  if (!tg_variables.empty()) {
    auto& last = tg_variables.back();
    offset = (last.offset + last.size + red_zone + unit - 1) / unit * unit;
  }
  tg_used = (tg_used + align - 1) / align * align + size;
  if (tg_used > launch->threadgroup_memory_limit)
    report(THREADGROUP_MEMORY, nullptr, line, "threadgroup variables need %zu bytes (%s last); the limit is %u",
           tg_used, name, launch->threadgroup_memory_limit);
  if (offset + size > THREADGROUP_CAPACITY) {
    report(THREADGROUP_MEMORY, nullptr, line, "too much threadgroup memory");
    die();
  }
  tg_variables.push_back({key, offset, size, name});
  return tg_memory + offset;
}

} // extern "C"
