// Counts what a simdgroup's loads fetch: lanes that load the same address in one instruction fetch it once, as on a
// GPU.
//
// Lanes run one after another here, so an instruction is recognised by its address and by how often the lane has been
// there: exact where lanes run in step, which is what a simdgroup does.
#pragma once
#include "state.h"
#include <unordered_map>
#include <unordered_set>

namespace {

std::unordered_map<void*, uint32_t> instruction_numbers;
std::vector<std::vector<uint32_t>> visits; // by thread of the threadgroup, then by instruction
std::unordered_set<uint64_t> fetched;

void forget_fetches() { // a new threadgroup runs
  fetched.clear();
  for (auto& counts : visits) counts.clear();
}

uint64_t scramble(uint64_t x) { // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Is this lane the first of its simdgroup to load this address in this instruction?
bool fetches(void* pc, uint8_t* address) {
  const uint32_t instruction = instruction_numbers.emplace(pc, instruction_numbers.size()).first->second;
  if (visits.size() <= current->linear) visits.resize(current->linear + 1);
  auto& counts = visits[current->linear];
  if (counts.size() <= instruction) counts.resize(instruction + 1);
  const uint64_t visit = counts[instruction]++;
  const uint64_t site = scramble((uint64_t(instruction) << 32 | visit) ^ scramble(current->simdgroup));
  return fetched.insert(scramble(site ^ (uint64_t)address)).second;
}

} // namespace
