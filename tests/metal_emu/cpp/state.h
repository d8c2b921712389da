// What the emulator knows of one launch. One launch at a time: the Python side holds a lock.
#pragma once
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include "../include/msl_rt.h"

using namespace msl_rt;

// ---- mirrored in launch.py ----

enum BufferFlags : uint32_t { WRITABLE = 1, INITIALISED = 2, RETURNED = 4 };
enum LaunchFlags : uint32_t { PARTIAL_SIMD_OK = 1, STRICT_WRITES = 2, COUNT_FETCHES = 4 };

struct BufferDescription {
  void* host;
  uint64_t size;
  const char* name;
  uint32_t granule; // bytes of one element
  uint32_t flags;
  uint64_t read_bytes, fetched_bytes, written_bytes, unwritten, first_unwritten;
};

struct Launch {
  Entry entry;
  void* module_address;
  uint32_t grid[3], threadgroup[3];
  uint32_t buffer_count, flags;
  uint32_t order; // of lanes, simdgroups and threadgroups: 0 ascending, 1 descending, 2 random lanes
  uint32_t seed, check, stack_kb;
  uint32_t threadgroup_memory_limit, max_reports;
  double timeout_s;
  BufferDescription* buffers;
  char* report;
  uint64_t report_capacity;
  uint64_t threadgroup_bytes, collectives, barriers, accesses, same_value_writes, switches;
};

namespace {

enum State : uint8_t { READY, SIMD, QUAD, BARRIER, DONE, DEAD };

// One GPU thread, with a stack of its own.
struct Fiber {
  void* sp;
  uint8_t* stack;
  State state;
  LaneFn fn; // of the collective it waits in; null for a barrier
  void* arg;
  const char* what;
  int line;
  uint32_t flags; // mem_flags of a barrier
  uint16_t linear, simdgroup, lane;
  ThreadInfo info;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

constexpr uint16_t MANY = 0xFFFF;

// The last access of a kind to one granule of writable memory. Epochs count barriers.
struct Access {
  uint32_t threadgroup, epoch, simd_epoch;
  uint16_t thread, simdgroup; // MANY: several
  uint8_t atomic;
};

struct Cell {
  Access write, read;
  uint8_t written;
};

struct Buffer {
  uint8_t *base, *end;
  const char* name;
  uint32_t granule;
  bool writable;
  Cell* cells;
  uint64_t read_bytes, fetched_bytes, written_bytes;
};

struct ThreadgroupVariable {
  const void* key;
  size_t offset, size;
  const char* name;
};

// A write that conflicts with another one; whether the values differ is known once it has happened.
struct PendingWrite {
  uint8_t* address;
  uint64_t old_value;
  uint32_t size;
  void* pc;
  Cell before;
  uint16_t thread;
  const char* name;
  uint64_t index;
  bool active;
};

struct Reported {
  int kind;
  void* pc;
  int line;
};

struct AddressRange {
  uintptr_t low, high;
};

constexpr size_t THREADGROUP_CAPACITY = 1 << 18; // above Metal's limit, so that the excess can be reported
constexpr size_t MAX_ARGUMENTS = 64;

Launch* launch;
std::vector<Buffer> buffers;
Buffer* last_buffer;
void* kernel_arguments[MAX_ARGUMENTS];
std::vector<AddressRange> module_ranges;

std::vector<Fiber> fibers;
Fiber* current; // null while the scheduler runs
void* scheduler_sp;
uint8_t *stacks_low, *stacks_high;
size_t stack_size;
uint32_t threads, simdgroups; // of the threadgroup that runs

uint8_t* tg_memory;
Cell* tg_cells;
std::vector<ThreadgroupVariable> tg_variables;
size_t tg_used;

uint32_t tg_serial, tg_epoch, device_epoch;
uint32_t simd_tg_epoch[64], simd_device_epoch[64];

PendingWrite pending;
bool fatal;
uint32_t report_count;
size_t report_length;
std::vector<Reported> reported;
sigjmp_buf segv_jump;
double deadline_s;
uint32_t random_state;

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

uint32_t next_random() { // xorshift32
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

} // namespace
