// The checker: every load and store of the kernel passes through access().
// Bounds, alignment, writes to inputs, reads of what nobody wrote, and races by barrier epochs.
#pragma once
#include "fiber.h"
#include "report.h"
#include "transactions.h"

namespace {

struct Place { // what is being accessed, for the reports
  uint8_t* address;
  uint32_t size;
  const char* name;
  uint64_t index;
  void* pc;
  bool threadgroup; // memory: threadgroup or device
  bool atomic;
};

typedef unsigned long long u64;

// A conflicting write is an error unless it stores the value that was there.
void settle_pending_write() {
  pending.active = false;
  uint64_t value = 0;
  memcpy(&value, pending.address, pending.size);
  if (value == pending.old_value && !(launch->flags & STRICT_WRITES)) {
    launch->same_value_writes++;
    return;
  }
  const Access& other = pending.before.write;
  report(RACE, pending.pc, 0, "%s[%llu]: unordered writes of different values by thread %u and thread %u of %s",
         pending.name, (u64)pending.index, other.thread, pending.thread,
         other.threadgroup == tg_serial ? "one threadgroup" : "different threadgroups");
}

inline uint32_t epoch_of(bool threadgroup) { return threadgroup ? tg_epoch : device_epoch; }

inline uint32_t simd_epoch_of(bool threadgroup) {
  return (threadgroup ? simd_tg_epoch : simd_device_epoch)[current->simdgroup];
}

// Is the current thread's access ordered after that one?
inline bool ordered(const Access& before, bool threadgroup) {
  if (before.threadgroup != tg_serial) return false;      // nothing orders different threadgroups
  if (before.epoch != epoch_of(threadgroup)) return true; // a threadgroup_barrier lies between
  if (before.thread == current->linear) return true;
  return before.simdgroup == current->simdgroup && before.simd_epoch != simd_epoch_of(threadgroup);
}

// Threadgroup memory starts anew with each threadgroup; device memory remembers all of them.
inline bool live(const Access& access, bool threadgroup) {
  return threadgroup ? access.threadgroup == tg_serial : access.threadgroup != 0;
}

inline bool conflicts(const Access& before, const Place& at) {
  return live(before, at.threadgroup) && !(at.atomic && before.atomic) && !ordered(before, at.threadgroup);
}

inline const char* missing(const Access& before) {
  return before.threadgroup == tg_serial ? "; a barrier is missing" : " of another threadgroup";
}

void stamp(Access& access, const Place& at) {
  access.threadgroup = tg_serial;
  access.epoch = epoch_of(at.threadgroup);
  access.simd_epoch = simd_epoch_of(at.threadgroup);
  access.atomic = at.atomic;
}

bool check_read(Cell& cell, const Place& at, bool raced) {
  if (!cell.written)
    report(UNINITIALISED_READ, at.pc, 0, "%s[%llu] (%u bytes) read before anything was written to it%s", at.name,
           (u64)at.index, at.size, at.threadgroup ? " (threadgroup memory)" : "");
  if (!raced && conflicts(cell.write, at)) {
    raced = true;
    report(RACE, at.pc, 0, "%s[%llu]: read is not ordered after the write by thread %u%s", at.name, (u64)at.index,
           cell.write.thread, missing(cell.write));
  }
  Access& last = cell.read;
  const bool known = live(last, at.threadgroup);
  if (known && last.threadgroup == tg_serial && last.epoch == epoch_of(at.threadgroup) &&
      last.thread != current->linear) {
    last.thread = MANY;
    if (last.simdgroup != current->simdgroup) last.simdgroup = MANY;
  } else if (known && last.threadgroup != tg_serial) {
    last.thread = last.simdgroup = MANY;
  } else {
    last.thread = current->linear;
    last.simdgroup = current->simdgroup;
  }
  stamp(last, at);
  return raced;
}

bool check_write(Cell& cell, const Place& at, bool raced) {
  if (!raced && conflicts(cell.read, at)) {
    raced = true;
    char reader[24] = "several threads";
    if (cell.read.thread != MANY) snprintf(reader, sizeof reader, "thread %u", cell.read.thread);
    report(RACE, at.pc, 0, "%s[%llu]: write is not ordered after the read by %s%s", at.name, (u64)at.index, reader,
           missing(cell.read));
  }
  if (!raced && conflicts(cell.write, at)) {
    raced = true;
    if (at.size <= 8 && !at.atomic) { // the store follows this hook: compare the values afterwards
      pending = {at.address, 0, at.size, at.pc, cell, current->linear, at.name, at.index, true};
      memcpy(&pending.old_value, at.address, at.size);
    } else {
      report(RACE, at.pc, 0, "%s[%llu]: unordered writes by thread %u and thread %u", at.name, (u64)at.index,
             cell.write.thread, current->linear);
    }
  }
  cell.write.thread = current->linear;
  cell.write.simdgroup = current->simdgroup;
  stamp(cell.write, at);
  cell.written = 1;
  return raced;
}

void check_cells(Cell* cell, size_t count, bool write, const Place& at) {
  if (pending.active) settle_pending_write();
  bool raced = false; // one report an access
  for (size_t i = 0; i < count; i++, cell++) {
    if (at.threadgroup && !live(cell->write, true)) cell->written = 0;
    raced = write ? check_write(*cell, at, raced) : check_read(*cell, at, raced);
  }
}

const char* verb(bool write) { return write ? "write" : "read"; }

void out_of_bounds(uint8_t* a, size_t size, bool write, void* pc) {
  Buffer* nearest = nullptr;
  size_t best = size_t(4) << 30;
  for (auto& b : buffers) {
    const size_t distance = a < b.base ? b.base - a : a - b.end;
    if (distance < best) {
      best = distance;
      nearest = &b;
    }
  }
  if (nearest)
    report(OUT_OF_BOUNDS, pc, 0, "%s of %zu bytes at %s[%lld], which has %zu elements (of %u bytes)", verb(write), size,
           nearest->name, (long long)(a - nearest->base) / (long long)nearest->granule,
           (size_t)(nearest->end - nearest->base) / nearest->granule, nearest->granule);
  else
    report(OUT_OF_BOUNDS, pc, 0, "%s of %zu bytes at an address in no buffer", verb(write), size);
  die();
}

void access_threadgroup(uint8_t* a, size_t size, bool write, bool atomic, void* pc) {
  const size_t offset = a - tg_memory;
  const ThreadgroupVariable* nearest = nullptr;
  for (auto& v : tg_variables) {
    if (offset >= v.offset && offset + size <= v.offset + v.size) {
      check_cells(tg_cells + offset, size, write,
                  {a, (uint32_t)size, v.name, (offset - v.offset) / size, pc, true, atomic});
      return;
    }
    if (v.offset <= offset) nearest = &v;
  }
  report(OUT_OF_BOUNDS, pc, 0, "%s of %zu bytes at byte %zu of threadgroup variable %s, which has %zu bytes",
         verb(write), size, nearest ? offset - nearest->offset : offset, nearest ? nearest->name : "?",
         nearest ? nearest->size : 0);
  die();
}

Buffer* find_buffer(uint8_t* a, size_t size) {
  if (last_buffer && a >= last_buffer->base && a + size <= last_buffer->end) return last_buffer;
  for (auto& b : buffers)
    if (a >= b.base && a + size <= b.end) return last_buffer = &b;
  return nullptr;
}

bool in_module(uint8_t* a) {
  for (auto& r : module_ranges)
    if ((uintptr_t)a >= r.low && (uintptr_t)a < r.high) return true;
  return false;
}

__attribute__((hot)) void access(uint8_t* a, size_t size, bool write, bool atomic, void* pc, bool aligned) {
  if (!current || (a >= stacks_low && a < stacks_high)) return; // thread-local memory
  if ((++launch->accesses & 0xFFFFF) == 0 && now_s() > deadline_s) {
    report(TIMEOUT, pc, 0, "time limit");
    die();
  }
  if (aligned && ((uintptr_t)a & (size - 1)) && !(size & (size - 1)))
    report(MISALIGNED, pc, 0, "%s of %zu bytes at a misaligned address", verb(write), size);
  if (a >= tg_memory && a < tg_memory + THREADGROUP_CAPACITY) return access_threadgroup(a, size, write, atomic, pc);
  Buffer* b = find_buffer(a, size);
  if (!b) {
    if (!in_module(a)) return out_of_bounds(a, size, write, pc);
    if (write) report(WRITE_TO_CONST, pc, 0, "write to program-scope (constant) data");
    return;
  }
  (write ? b->written_bytes : b->read_bytes) += size;
  if (!write && launch->flags & COUNT_FETCHES && fetches(pc, a)) b->fetched_bytes += size;
  if (write && !b->writable) {
    report(WRITE_TO_CONST, pc, 0, "write to input %s", b->name);
    return;
  }
  if (!b->cells) return;
  const size_t first = (a - b->base) / b->granule, last = (a + size - 1 - b->base) / b->granule;
  check_cells(b->cells + first, last - first + 1, write, {a, (uint32_t)size, b->name, first, pc, false, atomic});
}

} // namespace
