// The scheduler: runs the fibers of one threadgroup until all wait or returned, then lets collectives and barriers
// happen, and reports who is missing at them.
#pragma once
#include "hooks.h"

namespace {

std::string place_of(const Fiber& fiber) {
  if (fiber.state == DONE) return "returned";
  return std::string(fiber.what) + " line " + std::to_string(fiber.line);
}

// "0-15: simd_sum line 4; 16-31: returned"
std::string census(uint32_t low, uint32_t high) {
  std::string text;
  for (uint32_t first = low; first < high;) {
    const std::string place = place_of(fibers[first]);
    uint32_t last = first;
    while (last + 1 < high && place_of(fibers[last + 1]) == place) last++;
    text += text.empty() ? "" : "; ";
    text += std::to_string(first - low) + "-" + std::to_string(last - low) + ": " + place;
    first = last + 1;
    if (text.size() > 700) return text + " ...";
  }
  return text;
}

bool at_site_of(const Fiber& fiber, const Fiber& first) {
  return fiber.state == first.state && fiber.fn == first.fn && fiber.line == first.line && fiber.what == first.what;
}

// Runs the collective in which fiber `first` waits, for all fibers in [low, high) that wait there too.
void run_collective(uint32_t low, uint32_t high, Fiber& first, int width) {
  const Fiber site = first;
  void* arguments[32] = {};
  for (uint32_t i = low; i < high; i++) {
    if (!at_site_of(fibers[i], site)) continue;
    arguments[i - low] = fibers[i].arg ? fibers[i].arg : (void*)1;
    fibers[i].state = READY;
  }
  launch->collectives++;
  if (site.fn) {
    site.fn(arguments, width);
  } else { // simdgroup_barrier
    if (site.flags & 2) simd_tg_epoch[site.simdgroup]++;
    if (site.flags & 1) simd_device_epoch[site.simdgroup]++;
  }
}

void arrive(uint32_t low, uint32_t high, State state, int width) {
  Fiber* first = nullptr;
  uint32_t arrived = 0;
  for (uint32_t i = low; i < high; i++) {
    if (fibers[i].state == state && !first) first = &fibers[i];
    if (first && at_site_of(fibers[i], *first)) arrived++;
  }
  if (!first) return;
  if (arrived != high - low && !(launch->flags & PARTIAL_SIMD_OK)) {
    current = first;
    report(SIMD_DIVERGENCE, nullptr, first->line, "%s reached by %u of %u lanes. Lanes %s", first->what, arrived,
           high - low, census(low, high).c_str());
    current = nullptr;
    fatal = true;
    return;
  }
  run_collective(low, high, *first, width);
}

void lane_order(uint8_t* order, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) order[i] = launch->order == 1 ? count - 1 - i : i;
  if (launch->order != 2) return;
  for (uint32_t i = count - 1; i > 0; i--) std::swap(order[i], order[next_random() % (i + 1)]);
}

void resume_ready_lanes(uint32_t low, uint32_t high) {
  uint8_t order[32];
  lane_order(order, high - low);
  for (uint32_t i = 0; i < high - low && !fatal; i++) {
    Fiber& fiber = fibers[low + order[i]];
    if (fiber.state != READY) continue;
    launch->switches++;
    resume(fiber);
    if (!pending.active) continue;
    current = &fiber;
    settle_pending_write();
    current = nullptr;
  }
}

bool any_in(uint32_t low, uint32_t high, State state) {
  for (uint32_t i = low; i < high; i++)
    if (fibers[i].state == state) return true;
  return false;
}

// Until every lane of the simdgroup returned or waits at a threadgroup barrier.
void run_simdgroup(uint32_t simdgroup) {
  const uint32_t low = simdgroup * 32, high = low + 32 < threads ? low + 32 : threads;
  while (!fatal) {
    resume_ready_lanes(low, high);
    bool quads = false;
    for (uint32_t quad = low; quad < high && !fatal; quad += 4) {
      const uint32_t end = quad + 4 < high ? quad + 4 : high;
      if (!any_in(quad, end, QUAD)) continue;
      arrive(quad, end, QUAD, 4);
      quads = true;
    }
    if (fatal) return;
    if (quads) continue;
    if (!any_in(low, high, SIMD)) return;
    arrive(low, high, SIMD, 32);
    if ((launch->collectives & 0xFFFF) == 0 && now_s() > deadline_s) {
      report(TIMEOUT, nullptr, 0, "time limit");
      fatal = true;
    }
  }
}

// Lets the threads pass the barrier they wait at; false when the threadgroup has finished or cannot go on.
bool pass_barrier() {
  Fiber* first = nullptr;
  uint32_t same = 0, done = 0;
  for (uint32_t i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    done += fiber.state == DONE;
    if (fiber.state != BARRIER) continue;
    if (!first) first = &fiber;
    same += fiber.line == first->line && fiber.flags == first->flags;
  }
  if (!first) return false;
  if (same != threads) {
    current = first;
    report(BARRIER_DIVERGENCE, nullptr, first->line, "threadgroup_barrier reached by %u of %u threads. Threads %s",
           same, threads, census(0, threads).c_str());
    current = nullptr;
    if (same + done != threads || !(launch->flags & PARTIAL_SIMD_OK)) {
      fatal = true;
      return false;
    }
  }
  launch->barriers++;
  if (first->flags & 2) tg_epoch++;
  if (first->flags & 1) device_epoch++;
  for (uint32_t i = 0; i < threads; i++)
    if (fibers[i].state == BARRIER) fibers[i].state = READY;
  return true;
}

void run_threadgroup() {
  tg_serial++;
  tg_epoch++;
  device_epoch++;
  if (launch->flags & COUNT_FETCHES) forget_fetches();
  // 0xFF: what is read before it is written becomes a NaN
  for (auto& v : tg_variables) memset(tg_memory + v.offset, 0xFF, v.size);
  if (tg_variables.empty()) memset(tg_memory, 0xFF, 1 << 16);
  for (uint32_t i = 0; i < threads; i++) prepare(fibers[i]);
  do {
    for (uint32_t k = 0; k < simdgroups && !fatal; k++) run_simdgroup(launch->order == 1 ? simdgroups - 1 - k : k);
  } while (!fatal && pass_barrier());
}

} // namespace
