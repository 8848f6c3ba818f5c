// SPDX-License-Identifier: Apache-2.0

/* The first process of a pod's sandbox. It keeps the pod's namespaces open, does nothing, buries the children of others where the pod
 * shares its process namespace, and leaves when it is told to.
 */

#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>

int main(void)
{
	sigset_t wanted;
	int got;

	sigemptyset(&wanted);
	sigaddset(&wanted, SIGINT);
	sigaddset(&wanted, SIGTERM);
	sigaddset(&wanted, SIGCHLD);
	/* Blocked signals wait for sigwait: no handler, and none can come between two calls. The first process of a namespace gets no
	 * signal that it neither blocks nor handles.
	 */
	if (sigprocmask(SIG_BLOCK, &wanted, NULL) != 0)
		return EXIT_FAILURE;
	for (;;) {
		if (sigwait(&wanted, &got) != 0)
			return EXIT_FAILURE;
		if (got != SIGCHLD)
			return EXIT_SUCCESS;
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
