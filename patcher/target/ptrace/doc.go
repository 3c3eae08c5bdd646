// Package ptrace is the Linux backend: native hosts of PE images and Wine
// processes, on amd64.
//
// Memory is read and written through one /proc/PID/mem descriptor that belongs
// to the address space it was opened on, so a program replaced by execve cannot
// be written by mistake. A freeze stops threads with PTRACE_SEIZE and
// PTRACE_INTERRUPT from one locked operating system thread; if that thread or
// this whole process dies, the kernel lets every thread go on.
//
// Memory is mapped by a system call made in one thread of the target, which
// stands on a full signal frame that puts it back where it was. Our death at
// any instruction of that is harmless: the thread finishes the call, returns
// into sigreturn and goes on. Nothing here ever uses PTRACE_SINGLESTEP,
// PTRACE_O_EXITKILL, or a remote call while threads are frozen.
//
// # What a program can do to us
//
// Whoever reads the memory of a process takes its page faults, and its locks. A
// file mapped from a file system with a server of the user's own (FUSE) makes
// that wait without end, and in a way that SIGKILL does not end either. So pages of
// file systems that are not this machine's own are read only if they are there
// (far.go), no file of a process is opened, and every call that could wait is made
// where it can be left behind (patience.go): the answer is ErrBusy then, and the
// process is left alone until the call comes back. A RawSyscall must never be used
// for what could wait: it would keep all of us from going on.
//
// # What a stop does to a program
//
// Interrupted system calls are made again by the kernel and a program notices
// nothing, with exceptions that signal(7) names for every stop: epoll_wait,
// semop, sigtimedwait and some others return EINTR. Where one of them was given no
// time limit we have the kernel treat it like the rest, so that nothing shows.
// With a time limit the EINTR stays, as under strace or after SIGSTOP and SIGCONT:
// made again, the call would wait for its whole length. If we die inside a remote
// call, the one call that its thread waited in starts anew, a relative sleep with
// its whole length.
package ptrace
