/* The other tracer: a debugger that lets its debuggee run. */
#include "winhost.h"

static DWORD WINAPI until_input_ends(void *done)
{
	while (getchar() != EOF)
		;
	SetEvent(done);
	return 0;
}

void trace(DWORD pid)
{
	HANDLE done = CreateEventA(NULL, TRUE, FALSE, NULL);
	DEBUG_EVENT e;
	int told = 0;
	if (!DebugActiveProcess(pid))
		die("cannot debug", "process");
	DebugSetProcessKillOnExit(FALSE);
	new_thread(until_input_ends, done);
	while (WaitForSingleObject(done, 0) == WAIT_TIMEOUT) {
		if (WaitForDebugEvent(&e, 20)) {
			if (e.dwDebugEventCode == CREATE_PROCESS_DEBUG_EVENT)
				CloseHandle(e.u.CreateProcessInfo.hFile);
			else if (e.dwDebugEventCode == LOAD_DLL_DEBUG_EVENT)
				CloseHandle(e.u.LoadDll.hFile);
			/* The break-in thread's breakpoint is ours to swallow. */
			ContinueDebugEvent(e.dwProcessId, e.dwThreadId, e.dwDebugEventCode == EXCEPTION_DEBUG_EVENT &&
				e.u.Exception.ExceptionRecord.ExceptionCode != EXCEPTION_BREAKPOINT ? DBG_EXCEPTION_NOT_HANDLED : DBG_CONTINUE);
		} else if (!told) { /* all it had to tell at first is told */
			told = 1;
			printf("ready %lu\n", GetCurrentProcessId());
		}
	}
	DebugActiveProcessStop(pid);
	exit(0);
}
