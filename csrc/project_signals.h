// Python's signals during the CPU kernels' long calls.
#pragma once

namespace defgan {

// Handlers of signals run during calls from now on, and what they raise ends the call. Needs Python's lock.
void hear_python_signals();

}  // namespace defgan
