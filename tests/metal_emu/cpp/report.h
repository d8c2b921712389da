// Reports: what is wrong, where in the kernel, and which GPU thread did it. One per kind and place.
#pragma once
#include "state.h"

namespace {

enum Kind {
  OUT_OF_BOUNDS,
  UNINITIALISED_READ,
  RACE,
  WRITE_TO_CONST,
  SIMD_DIVERGENCE,
  BARRIER_DIVERGENCE,
  THREADGROUP_MEMORY,
  MISUSE,
  MISALIGNED,
  SEGFAULT,
  TIMEOUT,
  ARRAY_BOUNDS,
};

const char* const kind_names[] = {
    "out-of-bounds",
    "uninitialised-read",
    "race",
    "write-to-const",
    "simd-divergence",
    "barrier-divergence",
    "threadgroup-memory",
    "misuse",
    "misaligned",
    "segfault",
    "timeout",
    "array-bounds",
};

std::string current_thread() {
  if (!current) return "";
  auto& group = current->info.threadgroup_position_in_grid;
  char text[160];
  snprintf(text, sizeof text, "threadgroup (%u,%u,%u) thread %u [simdgroup %u lane %u]", group[0], group[1], group[2],
           current->linear, current->simdgroup, current->lane);
  return text;
}

// Fields are separated by 0x1f and records by 0x1e; launch.py takes them apart. pc is resolved there with addr2line.
__attribute__((format(printf, 4, 5))) void report(Kind kind, void* pc, int line, const char* format, ...) {
  for (auto& old : reported)
    if (old.kind == kind && old.pc == pc && old.line == line) return;
  reported.push_back({kind, pc, line});
  if (report_count >= launch->max_reports || report_length >= launch->report_capacity) return;
  report_count++;
  char message[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  size_t offset = 0;
  Dl_info module;
  if (pc && dladdr(pc, &module)) offset = (uintptr_t)pc - (uintptr_t)module.dli_fbase;
  report_length +=
      snprintf(launch->report + report_length, launch->report_capacity - report_length,
               "%s\x1f%zx\x1f%d\x1f%s\x1f%s\x1e", kind_names[kind], offset, line, current_thread().c_str(), message);
}

} // namespace
