package main

import "hotpatchd/patcher/build"

// advice is what an author can do about a refusal of the builder, where the
// refusal itself does not say it.
var advice = map[build.Code]string{
	build.CodeTLS: "link the fix without the C runtime, which brings thread-local storage: GCC -nostdlib, lld-link /nodefaultlib; and declare no variable thread_local",
	build.CodeEntryPoint: "link the fix without the C runtime and without an entry point: GCC -nostdlib -Wl,-e,0, lld-link /nodefaultlib /noentry; " +
		"C++ objects with constructors cannot be global",
	build.CodeExports: "mark what is to be replaced __declspec(dllexport), nothing else: GNU ld exports everything where nothing is marked; " +
		"for a function under a new name use --function NAME=NEWNAME",
	build.CodeNothing: "mark the new functions __declspec(dllexport), or name them: --function NAME",
	build.CodeShort: "replace its callers instead; in the next base give it room: GCC __attribute__((ms_hook_prologue)), " +
		"clang-cl and MSVC /hotpatch and linked with /functionpadmin",
	build.CodeJump:        "replace its callers instead; in the next base give it room: clang-cl and MSVC /hotpatch and linked with /functionpadmin",
	build.CodeInstruction: "replace its callers instead",
	build.CodeSymbol:      "hotpatch-build implib --base BASE tells what the base has symbols for; what the compiler inlined or dropped is not there: replace its callers",
	build.CodeAmbiguous:   "replace the callers of the one that is meant, or give the two different names in the next base",
	build.CodeSymbolFile:  "give by --symbols the unstripped file that the shipped base was made from, by strip or by /debug:none, not another build",
	build.CodeLength:      "give an unstripped twin of the base by --symbols",
	build.CodeWritable:    "declare the variable __declspec(dllimport) and link against the library that hotpatch-build implib writes",
	build.CodeMachine:     "compile the fix for the base's processor",
	build.Code32Bit:       "only 64-bit images can be patched",
}
