// A signal sets a flag, and Python runs its handler when the main thread next executes Python: after the call, unless the
// call asks. What the handler raises (KeyboardInterrupt, say) travels through torch as the exception that it is.
#include "project_signals.h"

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pthread.h>
#include <torch/csrc/utils/pybind.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <atomic>
#include <exception>

#include "cpu/interruption.h"

namespace defgan {
namespace {

namespace py = pybind11;

std::atomic<unsigned long> main_thread{0};

// Handlers run in the main thread alone, so all others need not wait for Python's lock. Python's word for which one that
// is counts; `threading` is wrong where a thread imported it first.
bool is_main_thread() {
#if defined(__linux__)
  if (syscall(SYS_gettid) == getpid()) return true;
#endif
  return PyThread_get_thread_ident() == main_thread.load();
}

// torch has taken away what differentiates, for as long as one of its operators runs. A handler is no part of that.
c10::impl::LocalDispatchKeySet keys_outside() {
  c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  if (!c10::InferenceMode::is_enabled())
    keys.excluded_ = keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return keys;
}

std::exception_ptr ask_python() {
  if (!Py_IsInitialized() || !is_main_thread()) return nullptr;
  const py::gil_scoped_acquire lock;
  if (PyErr_Occurred()) return nullptr;  // the call is made while another exception is handled in C
  const c10::impl::ForceDispatchKeyGuard guard(keys_outside());
  if (PyErr_CheckSignals() == 0) return nullptr;
  return std::make_exception_ptr(py::error_already_set());
}

}  // namespace

void hear_python_signals() {
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  // The thread that forks is the child's main thread.
  static const int once = pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
  (void)once;
  cpu::use_question(ask_python);
}

}  // namespace defgan
