// What every C++ test says when something is wrong. A test's main returns `failures != 0`.
#pragma once

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

// The text of the std::invalid_argument that a call throws, "" if it throws none.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}
